"""The clinical text of a phantom: findings in varied wording, never a word about age, sex or group.

Every finding that is drawn is named. A finding that is absent is sometimes denied; otherwise it goes unmentioned. The
wordings contain no one-letter words, so that the group names A to D cannot be read into them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

_POSITIVE: Mapping[str, Sequence[str]] = {
  "cardiomegaly": ("Cardiomegaly.", "Enlarged cardiac silhouette.", "The heart is enlarged."),
  "effusion_left": ("Left pleural effusion.", "Pleural effusion on the left.", "Left-sided pleural fluid."),
  "effusion_right": ("Right pleural effusion.", "Pleural effusion on the right.", "Right-sided pleural fluid."),
  "opacity": (
    "Focal opacity in the {side} {level} zone.",
    "{Side} {level} zone opacity.",
    "Airspace opacity projecting over the {side} {level} zone.",
  ),
  "pacemaker": ("Left chest wall pacemaker.", "Pacemaker in place.", "Cardiac pacemaker with lead in the right heart."),
}
_BOTH_EFFUSIONS = ("Bilateral pleural effusions.", "Pleural effusions on both sides.")
_NEGATIVE: Mapping[str, Sequence[str]] = {
  "cardiomegaly": ("Heart size is normal.", "No cardiomegaly."),
  "opacity": ("No focal opacity.", "No focal consolidation."),
  "pacemaker": ("No implanted device.",),
}
_NO_EFFUSION = ("No pleural effusion.", "Costophrenic angles are sharp.")
_NORMAL = (
  "No acute cardiopulmonary abnormality.",
  "No acute cardiopulmonary abnormality. Lungs are clear.",
  "Lungs are clear. No acute cardiopulmonary abnormality.",
)
_DENIED = 0.3  # probability that an absent finding is mentioned


def write_report(
  present: Mapping[str, bool], zone: tuple[str, str], rng: np.random.Generator
) -> tuple[str, dict[str, str]]:
  """The text and what it states.

  Args:
    present: whether each finding was drawn.
    zone: side ("left" or "right", the patient's) and level ("upper", "mid", "lower") of the opacity.
    rng: chooses wordings and order.

  Returns:
    The text, and {finding: "positive" | "negative"} for the findings it mentions.
  """

  def choose(wordings: Sequence[str]) -> str:
    return wordings[rng.integers(len(wordings))]

  side, level = zone
  stated = {name: "positive" for name, there in present.items() if there}
  effusions = [name for name in ("effusion_left", "effusion_right") if present[name]]
  sentences = []
  if len(effusions) == 2:
    sentences.append(choose(_BOTH_EFFUSIONS))
  for name in stated:
    if name not in effusions or len(effusions) == 1:
      sentences.append(choose(_POSITIVE[name]).format(side=side, Side=side.capitalize(), level=level))
  denials = []
  for name, wordings in _NEGATIVE.items():
    if not present[name] and rng.random() < _DENIED:
      stated[name] = "negative"
      denials.append(choose(wordings))
  if not effusions and rng.random() < _DENIED:
    stated |= {"effusion_left": "negative", "effusion_right": "negative"}
    denials.append(choose(_NO_EFFUSION))
  if not any(present.values()):
    sentences.append(choose(_NORMAL))
  sentences = [sentences[i] for i in rng.permutation(len(sentences))]
  return " ".join(sentences + [denials[i] for i in rng.permutation(len(denials))]), stated
