"""Age, sex and race as the reference's chest X-rays have them.

Like the schema this needs NumPy only.
"""

from compdiff_jax.conditioning.schema import Attribute, Schema

AGE = Attribute("age", "continuous", low=0, high=100, bins=(18, 40, 60, 80), unit="year")
SEX = Attribute("sex", "categorical", values=("male", "female"))
RACE = Attribute("race", "categorical", values=("white", "black", "asian", "hispanic"))

SCHEMA = Schema((AGE, SEX, RACE))
