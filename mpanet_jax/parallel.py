"""Per-device code on many devices: `jit` on one, `pmap` or `shard_map` on several, of one process or of many.

Outside the mapped functions every array is logically what it would be on one device: the state is replicated and has no
device axis, a batch is the whole batch (on many hosts: this process's rows of it). So checkpoints do not know how many
devices wrote them, and only this file knows how the work is spread.
"""

from collections.abc import Callable
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
    """Some devices and the way a function is mapped over them.

    Attributes:
      devices: in the order of the batch: those of process 0, then those of process 1, …
      mapping: 'pmap' or 'shard_map'; both give the same program, and one device needs neither.
    """

    devices: tuple[jax.Device, ...]  # pyright: ignore[reportInvalidTypeForm]: jaxlib has no stubs
    mapping: str = "pmap"

    @property
    def num_devices(self) -> int:
        """Of all processes."""
        return len(self.devices)

    @property
    def axis_name(self) -> str | None:
        """The axis that the per-device code reduces over; None on one device."""
        return AXIS if self.num_devices > 1 else None

    @cached_property
    def _mesh(self) -> Mesh:
        # Not jax.make_mesh, which may reorder the devices: the batch's rows follow this order.
        return Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    @cached_property
    def _num_local(self) -> int:
        return sum(device.process_index == jax.process_index() for device in self.devices)

    @cached_property
    def _everywhere(self) -> jax.sharding.Sharding:
        if self.num_devices == 1:
            return jax.sharding.SingleDeviceSharding(self.devices[0])
        return NamedSharding(self._mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """A copy of every array (NumPy's or JAX's, the same in all processes) on each device."""
        if self._num_local == self.num_devices:
            return jax.device_put(tree, self._everywhere)
        return jax.tree.map(self._replicate_over_processes, tree)

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
        """Compiles per-device iterations `(state, batches, images) → (state, metrics)`; the state is donated.

        Args:
          steps: per-device code that reduces over `axis_name`, so that all it returns is the same on every device.
          on_compiled: over several processes, called between a program's compilation (one for every number of steps)
            and its first call, for some processes compile faster than others.
          compiler_options: for XLA, of these programs alone.

        Returns:
          The same function of a replicated state, NumPy batches [steps, rows, …] (on several hosts this process's rows)
          and replicated images (or None).
        """
        if self.num_devices == 1:
            return jax.jit(steps, donate_argnums=0, compiler_options=compiler_options)
        if self.mapping == "pmap":
            # None: the state is one array on all devices, going in and coming out, not one with a device axis.
            mapped = jax.pmap(
                steps, AXIS, in_axes=(None, 1, None), out_axes=None, devices=self.devices, donate_argnums=0
            )
        else:
            everywhere, split = PartitionSpec(), PartitionSpec(None, AXIS)
            # check_vma=False: psum's transpose is psum, as in pmap; the losses are written for that (see losses.py).
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
            arguments = state, {name: self._split_rows(rows) for name, rows in batches.items()}, images
            # Not ahead of the call where it need not be: JAX_ENABLE_PGLE has jit compile again, by a profile.
            if self._num_local == self.num_devices and not compiler_options:
                return mapped(*arguments)
            num_steps = len(next(iter(batches.values())))
            if num_steps not in programs:
                programs[num_steps] = mapped.lower(*arguments).compile(compiler_options)
                on_compiled()
            return programs[num_steps](*arguments)

        return run

    def _split_rows(self, rows: np.ndarray) -> jax.Array:
        """[steps, rows, …] of this process as one array [steps, all rows, …]; for pmap [steps, devices, rows, …]."""
        if self.mapping == "pmap":
            rows = rows.reshape(len(rows), self._num_local, -1, *rows.shape[2:])
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, PartitionSpec(None, AXIS)), rows)

    def map_rows(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], jax.Array]:
        """Compiles `(variables, rows) → rows` where no row depends on another; the number of rows must divide."""
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
    """Every accelerator of every process."""
    return Parallel(tuple(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))), mapping)


def local_devices() -> Parallel:
    """This process's accelerators."""
    return Parallel(tuple(jax.local_devices()), "shard_map")


def on_first_device(tree: Any) -> Any:
    """Replicated arrays as arrays on this process's first device; no bytes are copied."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def global_num_ids(num_ids_per_batch: int, num_devices: int, batch_scale: str) -> int:
    """P of the batch of all devices.

    Args:
      num_ids_per_batch: data.num_ids_per_batch of the settings.
      num_devices: each takes the same number of whole identities.
      batch_scale: 'global': P is that of the whole batch; 'per_device': of every device's share.

    Raises:
      UserError: P does not divide over the devices; the message names the nearest that do.
    """
    if batch_scale == "per_device":
        return num_ids_per_batch * num_devices
    if num_ids_per_batch % num_devices:
        above = -(-num_ids_per_batch // num_devices) * num_devices
        nearest = f"{above - num_devices} or {above}" if above > num_devices else f"{above}"
        raise SettingsError(
            f"data.num_ids_per_batch = {num_ids_per_batch} identities do not divide over {num_devices} devices, "
            f"each of which takes whole identities: use {nearest}, or fewer devices, or "
            f"batch_scale = 'per_device' for {num_ids_per_batch} on each"
        )
    return num_ids_per_batch
