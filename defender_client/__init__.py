"""The defender: learns a defence in front of a classifier from its answers alone, and certifies it."""
