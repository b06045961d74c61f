from pathlib import Path

from setuptools import find_packages, setup

# The top-level folders are the sub-packages of `vidtta`; there is no `vidtta/` folder.
FOLDERS = ["engine", "kernels", "bench", "recipes", "slurm"]
packages = ["vidtta"] + [
    f"vidtta.{name}" for name in find_packages(include=[p for f in FOLDERS for p in (f, f"{f}.*")])
]

setup(
    name="vidtta",
    version="0.1.0",
    description="Adapt a video generator to each clip it is shown, then let it continue the clip",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    package_dir={"vidtta": "."},
    packages=packages,
    package_data={
        "vidtta.recipes": ["*.yaml", "*.md", "clips/*"],
        "vidtta.slurm": ["*.sbatch", "*.md"],
        "vidtta.engine": [
            "models/embedded/*",
            "models/embedded/*/*",
            "models/published_keys.json",
            "models/paths.md",
            "sampler.md",
            "path_table.json",
            "prepare/ucf101_captions.txt",
            "prepare/README.md",
            "report/README.md",
            "report/templates/*",
            "report/vendor/*",
        ],
    },
    # The caps on torch and torchvision keep pip from replacing one of the pair alone: each torchvision pins one torch.
    install_requires=[
        "torch>=2.11,<2.14",
        "torchvision>=0.26,<0.29",
        'triton>=3.6,<3.8; platform_system=="Linux"',
        "numpy>=2.0,<2.5",  # under 2.5 the interpreter of Triton 3.6 fails, which runs the kernels on a CPU
        "pyyaml>=6.0.2",
        "pydantic>=2.11,<3",
        "av>=18,<19",
        "libarchive-c>=5.1",
        "opencv-python>=4.12",
        "lpips==0.1.4",
        "transformers>=5,<6",
        "sentencepiece>=0.2",
        "protobuf>=5",
        "safetensors>=0.5",
        "huggingface-hub>=1.0",
        "rich>=13",
        "ftfy>=6.2",
        "beautifulsoup4>=4.12",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "scipy>=1.15",
        "pytest-benchmark>=5",
    ],
    extras_require={
        "xformers": ["xformers>=0.0.35"],
        "flash-attn": ["flash-attn-4>=4.0.0b12"],
        "peft": ["peft>=0.17"],
        "adaptive": ["scikit-learn>=1.5"],
        "search": ["optuna>=5"],
        "dev": [
            "scikit-learn>=1.5",
            "optuna>=5",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "scikit-image>=0.24",
            "playwright>=1.50",
            "ruff>=0.14",
            "pyright[nodejs]>=1.1.400",
        ],
    },
    entry_points={"console_scripts": ["vidtta=vidtta.engine.cli:entry"]},
)
