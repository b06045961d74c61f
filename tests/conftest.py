from vidtta.engine.torchvision_ops import declare_missing_operators

declare_missing_operators()
