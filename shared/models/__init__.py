"""nn.Modules that both programs must build alike: classifiers, reconstructors and the autoencoder."""
