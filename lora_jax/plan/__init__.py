"""What a training or decoding step would take on devices that need not be here."""
