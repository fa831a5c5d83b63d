"""The training stage: rotation-aware, quantization-aware adapters on torch, transformers and peft."""
