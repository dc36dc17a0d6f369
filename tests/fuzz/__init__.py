"""Fuzzing of everything that reads what strangers wrote; seeds/TARGET/ holds small inputs and every crash found."""
