"""StellarByte."""
