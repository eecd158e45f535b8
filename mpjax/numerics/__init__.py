"""Floor 1, mathematics: loss scales, attention and losses that stay exact where half precision would not."""
