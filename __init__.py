"""rqc: a Hugging Face model (and a LoRA adapter) in, one engine.plan for a small device out."""
