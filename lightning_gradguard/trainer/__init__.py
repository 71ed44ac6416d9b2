"""What has to be known of Lightning's Trainer beyond its hooks: one file a subject."""
