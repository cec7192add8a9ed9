"""What the paper shows of a model: statistics of queries and keys, attention distance, size, operations, figures."""
