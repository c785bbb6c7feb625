"""From files to batches: image sources, built-in faces, augmentation, sharded loading."""
