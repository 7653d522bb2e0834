"""The names of an adapter's files; without torch, for commands that only look into a folder."""

__all__ = ["ADAPTER_FILE", "CARD_FILE", "WEIGHTS_FILE"]

ADAPTER_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
