"""Runs per-device code: by `jit` on one device, by `pmap` or `shard_map` on several, of one process or of many.

Outside the mapped functions every array is what it would be on one device: the state is replicated and has no device
axis, and a batch is the whole batch (on several hosts, this process's rows of it). So checkpoints do not depend on the
number of devices, and only this file knows how the work is spread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mpanet_jax.errors import SettingsError
from mpanet_jax.state import TrainState

Steps = Callable[[TrainState, dict[str, Any], Any], tuple[TrainState, Any]]

AXIS = "devices"


@dataclass(frozen=True)
class Parallel:
    """Some devices, and how functions are mapped over them.

    Attributes:
      devices: in the order in which they take the rows of a batch: those of process 0, those of process 1, …
      mapping: 'pmap' or 'shard_map'; both make the same program. One device needs neither.
    """

    devices: tuple[jax.Device, ...]  # pyright: ignore[reportInvalidTypeForm]: jaxlib has no stubs
    mapping: str = "pmap"

    @property
    def num_devices(self) -> int:
        """How many devices there are, over all processes."""
        return len(self.devices)

    @property
    def axis_name(self) -> str | None:
        """The name of the mapped axis, over which per-device code reduces; None on one device."""
        return AXIS if self.num_devices > 1 else None

    @cached_property
    def _mesh(self) -> Mesh:
        # jax.make_mesh might reorder the devices; the rows of a batch follow this order.
        return Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    @cached_property
    def local(self) -> tuple[jax.Device, ...]:  # pyright: ignore[reportInvalidTypeForm]: jaxlib has no stubs
        """The devices of this process."""
        return tuple(device for device in self.devices if device.process_index == jax.process_index())

    @property
    def _num_local(self) -> int:
        return len(self.local)

    @cached_property
    def _everywhere(self) -> jax.sharding.Sharding:
        if self.num_devices == 1:
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return NamedSharding(self._mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """Copies every array of a tree to each device.

        Args:
          tree: of NumPy or JAX arrays, the same in all processes.
        """
        if self._num_local == self.num_devices:
            return jax.device_put(tree, self._everywhere)
        return jax.tree.map(self._replicate_over_processes, tree)

    def replicated_shapes(self, tree: Any) -> Any:
        """What `replicate` makes of arrays of these shapes, for functions that are compiled ahead of their call."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._everywhere), tree)

    def _replicate_over_processes(self, leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = self._replicate_over_processes(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, self._everywhere, lambda _: leaf)

    def map_steps(
        self,
        steps: Steps,
        *,
        on_compiled: Callable[[], None] = lambda: None,
        compiler_options: dict[str, str | bool] | None = None,
    ) -> Steps:
        """Maps and compiles the per-device code of training, `(state, batches, images) → (state, metrics)`.

        Args:
          steps: per-device code. It reduces over `axis_name`, so that it returns the same on every device.
          on_compiled: with several processes, called after the compilation of a program (one for every number of
            steps) and before its first call, because some processes compile faster than others.
          compiler_options: of XLA, for these programs alone.

        Returns:
          The same function on all devices, of a replicated state, which is donated, batches of `put_batches` or such as
          that takes, and replicated images or None.
        """
        if self.num_devices == 1:
            return jax.jit(steps, donate_argnums=0, compiler_options=compiler_options)
        if self.mapping == "pmap":
            # None: the state has no device axis, neither as an argument nor as a result.
            mapped = jax.pmap(
                steps, AXIS, in_axes=(None, 1, None), out_axes=None, devices=self.devices, donate_argnums=0
            )
        else:
            everywhere, split = PartitionSpec(), PartitionSpec(None, AXIS)
            # check_vma=False makes psum the transpose of psum, as in pmap; losses.py relies on that.
            mapped = jax.jit(
                jax.shard_map(
                    steps,
                    mesh=self._mesh,
                    in_specs=(everywhere, split, everywhere),
                    out_specs=everywhere,
                    check_vma=False,
                ),
                donate_argnums=0,
            )
        programs = {}

        def run(state: TrainState, batches: dict[str, np.ndarray], images: Any) -> tuple[TrainState, Any]:
            arguments = state, self.put_batches(batches), images
            # One process does not compile ahead of the call: with JAX_ENABLE_PGLE jit compiles again, by a profile.
            if self._num_local == self.num_devices and not compiler_options:
                return mapped(*arguments)
            num_steps = len(next(iter(batches.values())))
            if num_steps not in programs:
                programs[num_steps] = mapped.lower(*arguments).compile(compiler_options)
                on_compiled()
            return programs[num_steps](*arguments)

        return run

    def put_batches(self, batches: dict[str, Any]) -> dict[str, jax.Array]:
        """Sends batches to the devices, for functions of `map_steps`.

        Args:
          batches: NumPy arrays [steps, rows, …], on several hosts of this process's rows; or arrays of `join_rows`.
        """
        if self.num_devices == 1:
            return jax.device_put(batches, self._everywhere)
        return {name: self._split_rows(rows) for name, rows in batches.items()}

    def join_rows(self, parts: Sequence[jax.Array], *, stacked: bool) -> jax.Array:
        """Makes an array that a mapped function takes out of the rows that each device has; nothing is copied.

        Args:
          parts: arrays [rows of a device, …], on the devices `local`.
          stacked: they are [steps, rows of a device, …], for `map_steps`.
        """
        if self.num_devices == 1:
            return parts[0]
        spec = PartitionSpec(None, AXIS) if stacked else PartitionSpec(AXIS)
        if stacked and self.mapping == "pmap":
            parts = [part[:, None] for part in parts]
        shape = list(parts[0].shape)
        shape[stacked] *= self.num_devices
        return jax.make_array_from_single_device_arrays(tuple(shape), NamedSharding(self._mesh, spec), list(parts))

    def _split_rows(self, rows: np.ndarray | jax.Array) -> jax.Array:
        """Puts this process's [steps, rows, …] on its devices, as part of an array [steps, rows of all processes, …].

        For pmap the array is [steps, devices, rows of a device, …].
        """
        sharding = NamedSharding(self._mesh, PartitionSpec(None, AXIS))
        if isinstance(rows, jax.Array) and rows.sharding == sharding:  # of `join_rows`
            return rows
        if self.mapping == "pmap":
            rows = rows.reshape(len(rows), self._num_local, -1, *rows.shape[2:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows))

    def map_rows(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], jax.Array]:
        """Maps and compiles `(variables, rows) → rows`, in which no row depends on another.

        The number of rows must be a multiple of the number of devices, which share the rows.
        """
        if self.num_devices == 1:
            return jax.jit(function)
        split = PartitionSpec(AXIS)
        mapped = jax.jit(
            jax.shard_map(
                function, mesh=self._mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
            )
        )
        sharding = NamedSharding(self._mesh, split)
        return lambda variables, rows: mapped(variables, jax.device_put(rows, sharding))


def all_devices(mapping: str = "pmap") -> Parallel:
    """All devices of all processes."""
    return Parallel(tuple(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))), mapping)


def local_devices() -> Parallel:
    """The devices of this process."""
    return Parallel(tuple(jax.local_devices()), "shard_map")


def on_first_device(tree: Any) -> Any:
    """A tree of replicated arrays as arrays on this process's first device; nothing is copied."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def global_num_ids(num_ids_per_batch: int, num_devices: int, batch_scale: str) -> int:
    """P of the whole batch, over all devices.

    Args:
      num_ids_per_batch: settings.data.num_ids_per_batch.
      num_devices: each gets the same number of whole identities.
      batch_scale: 'global': `num_ids_per_batch` is P of the whole batch; 'per_device': of each device's share.

    Raises:
      UserError: P is no multiple of the number of devices; the message names the nearest that are.
    """
    if batch_scale == "per_device":
        return num_ids_per_batch * num_devices
    if num_ids_per_batch % num_devices:
        above = -(-num_ids_per_batch // num_devices) * num_devices
        nearest = f"{above - num_devices} or {above}" if above > num_devices else f"{above}"
        raise SettingsError(
            f"data.num_ids_per_batch = {num_ids_per_batch} identities do not divide over {num_devices} devices, and "
            f"each device takes whole identities: use {nearest}, or fewer devices, or "
            f"batch_scale = 'per_device' for {num_ids_per_batch} on each"
        )
    return num_ids_per_batch
