"""The program: an fx graph with its contract, passes that rewrite it, and how it is written down."""
