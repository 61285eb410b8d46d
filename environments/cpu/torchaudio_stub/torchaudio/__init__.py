"""Import shim for text-only CPU environments: llamafactory.data.mm_plugin imports torchaudio unconditionally."""

__version__ = "2.11.0+textonly"


def __getattr__(name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(f"torchaudio.{name} is not available: this environment is text-only")
