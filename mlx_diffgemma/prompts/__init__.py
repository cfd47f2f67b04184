"""Text in and out: tokenizer, chat template, and the channels of an answer."""
