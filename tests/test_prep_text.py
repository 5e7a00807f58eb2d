"""What becomes of reports, prompts, recorded demographics and free text before anything is stored."""

import pytest

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Attribute, Schema
from data_prep import demographics, prompts, reports, scrub
from data_prep.fairgenmed import conditions
from data_prep.leaks import Scanner
from data_prep.rows import RowError

_SCHEMA = Schema((
  Attribute("age", "continuous", low=0, high=100, bins=(40, 60), unit="year"),
  Attribute("sex", "categorical", values=("male", "female")),
))  # fmt: skip

OFFICIAL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 INDICATION:  ___F with cough  // eval for pneumonia

 COMPARISON:  None.

 FINDINGS:

 The lungs are clear.

 IMPRESSION:

 1.  No acute process.
 2.  CT: see other report.  Old rib fracture.

 NOTIFICATION:   Dr. ___ was paged.
"""


@pytest.mark.parametrize(
  ("report", "expected"),
  [
    (OFFICIAL, "1. No acute process. 2. CT: see other report. Old rib fracture."),
    (OFFICIAL.replace("IMPRESSION:\n", "IMPRESSION:  ___\n").partition(" 1. ")[0], "The lungs are clear."),
    (OFFICIAL.replace("\n", "\r\n"), "1. No acute process. 2. CT: see other report. Old rib fracture."),
    ("WET READ: ___ 4:00 PM\n  IMPRESSION: preliminary.\n" + OFFICIAL.replace(" 2. ", " 3. "), None),
    (" CONCLUSION: Stable.\n", "Stable."),
    (" FINDINGS AND IMPRESSION:  Stable.\n______________\nSigned", "Stable."),
    (" FINDINGS: Clear.\n INDICATION: 50 year old man.\n", "Clear."),
    ("A 50 year old man. The impression: is of prose.\n", ""),
    (" INDICATION: cough\n The lungs are clear.\n", ""),
    ("", ""),
  ],
)
def test_impression(report, expected):
  found = reports.impression(report)
  assert found.startswith("1. No acute process. 3.") if expected is None else found == expected


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("Compared to ___, no change.", "Compared to, no change."),
    ("Seen on 3/14/2150 at 10:45 AM. Stable.", "Seen on at. Stable."),
    ("Radiograph dated 3/14. Stable since March 5, 2150.", "Radiograph. Stable since."),
    ("Discussed with Dr. Ann Miller-Smith by phone (555) 123-4567.", "Discussed with by phone."),
    ("Accession number: AB1234567, MRN 0012345.", "Number:"),
    ("Call a.b@c.org about 12345678.", "Call about."),
    ("___ year old woman with an old fracture. She is stable.", "Patient with an old fracture. The patient is stable."),
    ("Mr. Jones, 81 y/o, elderly Caucasian male. Clear.", "Patient. Clear."),
    ("63M and ___F with MS Findings.", "And with MS Findings."),
    ("Black lines; 2/3 of the lung, 10 mm nodule, L4/5, marked 10 cm.", None),
    ("T2-3 level 1.5-20 cm, decreased 5 mm; 8 F catheter? ratio 3.", None),
    # Ages with the letter of the sex
    ("___ yo F with cough", "Patient with cough"),
    ("45yo M, effusion", "Patient, effusion"),
    ("72-year-old F", "Patient"),
    ("Age: 45. Sex: F.", ""),
    ("Age: 45 years. Gender: female. Race: Black or African American. Effusion.", "Effusion."),
    ("A 45 y F, 60/M and F/72, pt F: clear.", "Patient, and, patient: clear."),
    ("___F. Cough. ___ F with edema.", "Cough. With edema."),
    ("28F with 28 F chest tube.", "With 28 F chest tube."),
    ("72 year old f/u nodule", "Patient f/u nodule"),
    # Identifiers
    ("Since 12-May-2014, 5/2014, 12/May/2014 or may 2014. Clear.", "Since, or. Clear."),
    ("2014-05-06T10:11 and 2014-05-06T10:11:12.5Z, 20140506T1011. Clear.", "And, Clear."),
    ("Discussed with dr. smith and Dr. J. A. Smith today.", "Discussed with and today."),
    ("Patient name: John A. Smith. Effusion.", "Effusion."),
    ("Name: SMITH, JOHN A. Effusion.", "Effusion."),
    ("mr. smith and Mrs. Smith: clear.", "And: clear."),
    ("Stable. Patient's name: Ann Lee, first name: Ann. Clear.\nName: Lee", "Stable. Clear."),
    ("Gender: no information. Heart normal", "Heart normal"),
    ("A 55-y-o patient; a 7-month-old and an 8-week-old. Clear.", "Patient; patient and patient. Clear."),
    ("Female, 72", "Patient"),
    ("Men 65. Woman, 5 nodules; female, 72 mm.", "Patient. Patient, 5 nodules; patient, 72 mm."),
    ("A fifteen year old, aged seventy-two. Age seven.", "Patient,"),
    ("African-Americans and Asians, three ladies, her mothers. Clear.", "And, three patient, the relative. Clear."),
    ("Mr and Mrs. came. Pregnancies and prostatectomy.", "Relative and relative came. And."),
    ("Clear. Electronically signed by Jane Doe.", "Clear."),
    ("Signed by J. Smith MD at 3pm, read by: Lee, MD. Clear.", "At, Clear."),
    ("SMITH, JOHN. Clear lungs, patient: DOE, JANE A. seen.\nLEE, ANNA\nClear.", "Clear lungs, patient: seen. Clear."),
    ("Call 555-1234 on the 3rd of March at 10 p.m. or 11AM.", "Call on the at or."),
    ("Compared to 3/14/2150 and 12/11, stable; compared with 12/10 or 12/11.", "Compared to, stable;"),
    ("Sex: not stated. Race: n/a. Age: 6 months.", ""),
    ("Age: unknown. Aged 3 weeks old. Age: not given. Clear.", "Clear."),
    # What only looks like them
    ("EXAM NAME: CHEST RADIOGRAPH. HEART NORMAL", None),
    ("Procedure name: Chest PA and lateral.", None),
    ("Referring MD name: John Smith. Effusion Name: Ann Lee", "Referring MD. Effusion"),
    ("60 M/white. 72/F/Black woman", "/white. / patient"),
    ("A white 60-year-old woman, 72 yo white F, Black, Female, 61 years old, whites. Clear", "Patient, Clear"),
    ("White-out; white lung, patient rotated. Whites of the eyes. Black blood, white matter.", None),
    ("Correlate with MR. No effusion.", None),
    ("MS. Chronic changes.", None),
    ("Portable DR. No effusion.", None),
    ("8 F catheter tip, 10F pigtail, an 8 F right-sided PICC; chest tube (28 F).", None),
    ("Nodule 2.5 F. Fever 100.4 F. 3,5 M.", None),
    ("T12/L1 vertebra, 3/4 of the lung and 2/3 of it; 1-2 mm, 500-1000 ml, 3 ribs, 5 p.o.", None),
    ("Fracture 8 weeks old. One of two nodules. Read by the team. Sister Mary Joseph nodule.", None),
    ("HEART, LUNGS: clear. LINES, TUBES AND DRAINS: none. No EDEMA, EFFUSION or mass. CT, MRI.", None),
    ("COPD, ARDS and CHF. By CT, PICC is in place.", None),
    ("EDEMA, EFFUSION. HEART NORMAL, LUNGS CLEAR", None),
    ("Nodule, 2 year F/U. Recommend 1 yr F/U CT. 12 F/U.", None),
    ("Patient F/U in 6 weeks. Segment 6 may represent scar. Stage T2 N1 M0, 1/2.", None),
  ],
)
def test_scrub(text, expected):
  found = scrub.scrub(text, scrub.ALL)
  if expected == "Number:":
    assert not any(digit in found for digit in "0123456789")
  else:
    assert found == (text if expected is None else expected)
  # What is left names no age or sex, and what is meant to stay never did.
  assert not Scanner(_SCHEMA)(found) and (expected is not None or not Scanner(_SCHEMA)(text))


def test_long_texts_without_an_end_do_not_hang():
  for text in ("a@" * 10_000, *(word + " " * 20_000 + "clear" for word in ("Record", "sixty")), "DOE, JANE\n" * 1000):
    assert scrub.scrub(text, scrub.ALL)
  assert scrub.scrub("\n" * 20_000 + "clear", scrub.ALL) == "Clear"


def test_rules_from_a_file(tmp_path):
  (tmp_path / "rules.txt").write_text("# names of wards\nward \\d+\nST\\. ELSEWHERE => hospital\n\n")
  rules = scrub.read_rules(tmp_path / "rules.txt")
  assert scrub.scrub("From ward 12 of St. Elsewhere.", rules) == "From of hospital."
  (tmp_path / "rules.txt").write_text("good\n(bad\n")
  with pytest.raises(InputError, match="line 2"):
    scrub.read_rules(tmp_path / "rules.txt")
  with pytest.raises(InputError, match="cannot read"):
    scrub.read_rules(tmp_path / "none.txt")


@pytest.mark.parametrize(
  ("text", "age"),
  [("58", "58"), ("058Y", "58"), ("006M", "0.5"), (">89", "90"), ("90+", "90"), (" ", ""), ("NaN", ""), ("155", "155")],
)
def test_ages(text, age):
  assert demographics.parse_age(text) == age


def test_races_as_recorded():
  hispanic = "CENTRAL AMERICAN,COLUMBIAN,CUBAN,DOMINICAN,GUATEMALAN,HONDURAN,MEXICAN,PUERTO RICAN,SALVADORAN"
  groups = {  # all of MIMIC-IV, and how other sets say it
    "white": {"WHITE", "WHITE - BRAZILIAN", "WHITE - EASTERN EUROPEAN", "WHITE - OTHER EUROPEAN", "WHITE - RUSSIAN"}
    | {"White or Caucasian", "White, non-Hispanic"},
    "black": {"BLACK/AFRICAN", "BLACK/AFRICAN AMERICAN", "BLACK/CAPE VERDEAN", "BLACK/CARIBBEAN ISLAND"}
    | {"Black or African American"},
    "asian": {"ASIAN", "ASIAN - ASIAN INDIAN", "ASIAN - CHINESE", "ASIAN - KOREAN", "ASIAN - SOUTH EAST ASIAN"},
    "hispanic": {"HISPANIC OR LATINO", *(f"HISPANIC/LATINO - {place}" for place in hispanic.split(","))},
    "other": {"OTHER", "PORTUGUESE", "SOUTH AMERICAN", "MULTIPLE RACE/ETHNICITY", "AMERICAN INDIAN/ALASKA NATIVE"}
    | {"NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER"},
    "": {"UNKNOWN", "UNABLE TO OBTAIN", "PATIENT DECLINED TO ANSWER", "Race and Ethnicity Unknown", "", "nan"},
  }
  for group, texts in groups.items():
    assert {demographics.parse_race(text) for text in texts} == {group}
  for text in ("Martian", "Blackish", "1"):
    with pytest.raises(ValueError, match="race"):
      demographics.parse_race(text)
  assert demographics.agreed_race({"WHITE", "WHITE - RUSSIAN", "UNKNOWN"}) == "white"
  assert demographics.agreed_race({"WHITE", "OTHER"}) == "" == demographics.agreed_race(set())
  with pytest.raises(ValueError, match="sex"):
    demographics.parse_sex("X")


def test_ages_above_89_are_one_group():
  assert demographics.age_at("52", "2180", 2187) == "59"
  assert demographics.age_at("52", "2180", 2178) == "50"
  assert demographics.age_at("88", "2180", 2182) == "91" == demographics.age_at("91", "2180", 2150)
  with pytest.raises(ValueError, match="age -3"):
    demographics.age_at("2", "2180", 2175)


def test_prompts_of_the_reference():
  chest = prompts.split_prompt("54 year old White male. Opacity. A 3 year old lesion.")
  assert chest == {"age": "54", "race": "White", "sex": "male", "text": "Opacity. A 3 year old lesion."}
  fundus = "SLO fundus image of a Black, Female, {} patient with the following conditions: glaucoma, myopia"
  assert prompts.split_prompt(fundus.format("61 years old"))["age"] == "61"
  parts = prompts.split_prompt(fundus.format("unknown age"))
  assert parts == {"age": "", "race": "Black", "sex": "Female", "text": "glaucoma, myopia"}
  for other in (
    "Opacity.",
    "54 year old. Opacity.",
    "a 54 year old White male. Opacity.",
    "54 year old White male.",
    "",
  ):
    with pytest.raises(ValueError, match=r"neither template$"):  # and nothing of the text
      prompts.split_prompt(other)


def test_conditions_of_a_fundus_image():
  text, findings = conditions("Yes", "severe", "borderline", "neutral")
  assert text == "glaucoma, severe vision loss, borderline cup-disc ratio, emmetropia"
  assert findings["abnormal cup-disc ratio"] == "uncertain" and findings["myopia"] == "negative"
  assert conditions("0", "", "unknown", "") == ("non-glaucoma", {"glaucoma": "negative"})
  assert conditions("", "", "", "") == ("", {})
  for level in ("mild", "moderate", "severe"):
    assert conditions("", level, "", "") == (f"{level} vision loss", {"vision loss": "positive"})
  with pytest.raises(RowError, match="cdr_status 'huge'"):
    conditions("1", "normal", "huge", "positive")
  with pytest.raises(RowError, match="md_severity 'jane doe' is not one of normal, mild, moderate, severe"):
    conditions("1", "Jane Doe", "normal", "positive")
