"""fastft: Hugging Face models fine-tune faster and in less GPU memory, and prove on your machine that nothing else changed."""

__version__ = "0.1.0"
