"""A stand-in, not timm, whose file of this name has what the official transformer would drop whole paths with."""


class DropPath:
    pass
