"""`trunkline benchmark`: speed side by side with peers."""
