"""`flarec bench decode`: steps of whole models, beside stock transformers in the same run."""
