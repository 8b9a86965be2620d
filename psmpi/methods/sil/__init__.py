"""The method `sil`: synthetic intermediate labels."""
