"""Floor 1, descriptions: which dtype holds where, as one value and one string; and what each chip is good at."""
