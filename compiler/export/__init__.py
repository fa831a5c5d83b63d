"""`rqc export`: a 4-bit Hugging Face checkpoint of an engine's own codes, or of a model directory."""
