"""nn.Modules that both programs must build alike: classifiers and the autoencoder."""
