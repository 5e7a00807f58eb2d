"""Demographic conditioning: from a schema and a batch of attributes to cross-attention tokens and losses."""
