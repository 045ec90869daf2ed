"""What both programs speak: the wire, the network architectures and the data sets."""
