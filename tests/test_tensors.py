"""The restricted reader of pickled tensors: what torch writes is read exactly, everything else is refused unrun."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch

from data_prep.tensors import UnsafePickle, load_tensor


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
def test_tensors_of_torch(protocol, dtype):
  tensor = (torch.arange(24).reshape(2, 3, 4) * 1.5).to(dtype)
  for given in (tensor, tensor.transpose(0, 2), tensor[1, :, 1:3], tensor[:0]):
    found = load_tensor(pickle.dumps(given, protocol))
    np.testing.assert_array_equal(found, given.numpy())
    assert found.dtype == given.numpy().dtype


class Call:
  """Pickles as a call of `function(*arguments)`."""

  def __init__(self, function, *arguments):
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


def storage_bytes(replace=()) -> bytes:
  file = io.BytesIO()
  torch.save(torch.arange(4.0).untyped_storage(), file, _use_new_zipfile_serialization=False)
  data = file.getvalue()
  for old, new in replace:
    data = data.replace(old, new)
  return data


def tensor_pickle(size=(4,), stride=(1,), offset=0, storage=None) -> bytes:
  file = io.BytesIO()
  torch.save(torch.arange(4.0).storage(), file, _use_new_zipfile_serialization=False)
  inner = Call(torch.storage._load_from_bytes, file.getvalue() if storage is None else storage)
  return pickle.dumps(
    Call(torch._utils._rebuild_tensor_v2, inner, offset, size, stride, False, collections.OrderedDict())
  )


def test_the_hand_made_pickle_is_a_tensor():
  np.testing.assert_array_equal(load_tensor(tensor_pickle()), np.arange(4.0))
  np.testing.assert_array_equal(pickle.loads(tensor_pickle()).numpy(), np.arange(4.0))


def test_nothing_in_a_pickle_is_run(tmp_path):
  target = tmp_path / "ran"
  command = f"touch {target}"
  bad = {
    "os.system": pickle.dumps(Call(os.system, command)),
    "eval": pickle.dumps(Call(eval, f"open({str(target)!r}, 'w')")),
    "exec": pickle.dumps(Call(exec, f"open({str(target)!r}, 'w')")),
    "getattr": b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR.",
    "inside the arguments": pickle.dumps([torch.zeros(2), Call(os.system, command)]),
    "as a storage": pickle.dumps(
      Call(torch._utils._rebuild_tensor_v2, Call(os.system, command), 0, (1,), (1,), False, {})
    ),
    "inside a storage": tensor_pickle(storage=pickle.dumps(Call(os.system, command))),
    "after the magic": tensor_pickle(storage=storage_bytes()[:15] + pickle.dumps(Call(os.system, command))),
    "dotted": b"\x80\x04\x8c\x0bcollections\x8c\x12OrderedDict.update\x93.",
    "extension code": b"\x80\x02\x82\x01.",
  }
  for name, data in bad.items():
    with pytest.raises(UnsafePickle):
      load_tensor(data)
    assert not target.exists(), name
  pickle.loads(bad["os.system"])  # the same bytes, unrestricted, do run
  assert target.exists()


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"\x80\x04.",
    pickle.dumps([1, 2]),
    pickle.dumps(collections.OrderedDict()),
    pickle.dumps(np.zeros(3)),
    pickle.dumps(torch.arange(3)),  # integers are no image
    pickle.dumps(torch.zeros(3))[:-30],
    tensor_pickle(size=(5,)),
    tensor_pickle(size=(2,), stride=(4,)),
    tensor_pickle(offset=1),
    tensor_pickle(size=(-1,)),
    tensor_pickle(stride=(-1,)),
    tensor_pickle(size=(1 << 40,), stride=(0,)),  # one number shown as a terabyte
    tensor_pickle(size=(2, 2)),
    tensor_pickle(size=(5,), stride=(0,)),
    tensor_pickle(size="ab"),
    tensor_pickle(storage=b"\x80\x02K\x01.\x80\x02K\x01."),
  ],
)
def test_what_is_no_tensor_is_refused(data):
  with pytest.raises(UnsafePickle):
    load_tensor(data)
