"""What every room stands on: no method lives here."""
