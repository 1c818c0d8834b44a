"""Two fusions for models like Gemma: `softcap`, described by its meaning, and `geglu`, by a search function."""
