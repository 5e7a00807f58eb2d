"""Input: the record format, the tokenizer, prompts and the Grain pipeline. Nothing here needs TensorFlow."""
