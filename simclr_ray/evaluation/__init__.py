"""How good is a frozen encoder, by which protocol."""
