"""Ready configs; in an installed package they are dist_train.configs, where the command line finds the quickstart."""
