"""Floor 0: the words, the formats, the verbs over pytrees and the contract. Knows no Flax."""
