"""`trunkline benchmark`: compare speed with other libraries."""
