"""ltx-train: train, measure and ship LTX-2.3 LoRAs, in-context LoRAs and full fine-tunes."""

__version__ = "0.2.0"
