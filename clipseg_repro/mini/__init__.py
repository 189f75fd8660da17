"""The mini world: `vocabulary`, `scenes`, `phrases`, `export` (to official layouts) and the pre-training of its towers."""
