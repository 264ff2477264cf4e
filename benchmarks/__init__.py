"""What raykernel costs, beside other ways to the same kernel and beside a floor for all of them."""
