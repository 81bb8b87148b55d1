"""From a Hugging Face model to a captured program: hooks per family, export, and the cache of captured graphs."""
