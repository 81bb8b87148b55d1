"""What an evaluation is made of: scores of the clean stream, grades, statistics, its record; lm-eval's model class."""
