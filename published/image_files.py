"""Images that stay in their files, and training batches of them decoded in worker processes.

Where the files lie stands in published/image_folders.py; batches of images in memory in
common/data.py.
"""

import copy
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from common import UserError, files, run
from common.data import Batches, packed, seed_of

N_HASHED = 10_000  # files whose bytes a digest covers at most


class ImageFiles:
    """An array of images that stay in their files: images[rows] decodes them in threads.

    rows is a slice or a list of row numbers; the result is uint8 (len(rows), size, size, 3).
    resize: length of the shorter side before the centre crop to `size` pixels, the usual view for
    testing. None: the images have that size already.
    """

    def __init__(self, paths, resize, size):
        # Bytes in one array and not a million strings: Python writes to a string's reference count
        # when it is used, which would copy the memory of all of them into every worker process.
        self.names = np.array([os.fsencode(path) for path in paths], np.bytes_)
        self.resize = resize
        self.size = size

    def __len__(self):
        return len(self.names)

    def path(self, row):
        return os.fsdecode(self.names[row])

    @property
    def paths(self):
        return [os.fsdecode(name) for name in self.names]

    def part(self, rows):
        """Return the ImageFiles of a slice or list of rows."""
        return ImageFiles(self.names[rows], self.resize, self.size)

    def names_and_sizes(self, on_this_machine=False):
        """<class folder>/<name> and size of each file, a line each, as bytes.

        on_this_machine: its whole path, and the times of its last changes, too.
        """
        paths = self.paths

        def lines_of(some_paths):
            lines = []
            for path in some_paths:
                name = "/".join(path.split(os.sep)[-2:])
                with files.reading(path, "an image"):
                    found = os.stat(path)
                line = f"{name} {found.st_size}"
                if on_this_machine:
                    times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
                    line = f"{os.path.abspath(path)} {found.st_size} {times}"
                lines.append(f"{line}\n")
            return os.fsencode("".join(lines))

        groups = [paths[start : start + 1000] for start in range(0, len(paths), 1000)]
        with ThreadPoolExecutor(16) as pool:  # a network file system takes its time for each file
            return b"".join(pool.map(lines_of, groups))

    def sha256(self):
        """Hex digest of the names and sizes of all files, and of the bytes of N_HASHED of them, and
        of the size at which they are decoded.

        Those are evenly spaced, first and last included. Names count from the class folder on, so
        that the data set can be moved.
        """
        digest = hashlib.sha256(self.names_and_sizes())
        digest.update(f"{self.resize} {self.size}".encode())
        n_hashed = min(len(self), N_HASHED)
        rows = np.arange(n_hashed) * (len(self) - 1) // max(n_hashed - 1, 1)
        with ThreadPoolExecutor(16) as pool:
            for file_digest in pool.map(files.sha256, [self.path(row) for row in rows]):
                digest.update(file_digest.encode())
        return digest.hexdigest()

    def open(self, row):
        """Decode one image at its own size, as a PIL image in RGB. Raises UserError."""
        path = self.path(row)
        with files.reading(path, "a readable image"), Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut numbers above 255 off
                raise UserError(f"{path}: pixels of mode {image.mode}, expected 8 bits a channel")
            return image.convert("RGB")

    def _decode(self, row):
        image = self.open(row)
        if self.resize is not None:
            image = v2.functional.resize(image, self.resize)
            image = v2.functional.center_crop(image, self.size)
        if image.size != (self.size, self.size):
            expected = f"{self.size} x {self.size}"
            raise UserError(
                f"{self.path(row)}: {image.width} x {image.height} pixels, expected {expected}"
            )
        return np.asarray(image)

    def __getitem__(self, rows):
        rows = range(len(self))[rows] if isinstance(rows, slice) else [int(row) for row in rows]
        images = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        n_threads = min(16, os.cpu_count() or 1)
        with ThreadPoolExecutor(n_threads) as pool:  # Pillow decodes outside Python's lock
            for place, image in enumerate(pool.map(self._decode, rows)):
                images[place] = image
        return images


def check_images(parts, rank=0, world_size=1):
    """Decode this rank's share of all images. Raises UserError that names the broken ones.

    parts: a list of ImageFiles; arrays among them were decoded before.
    """

    def error_of(image):
        files_of_part, row = image
        try:
            files_of_part._decode(row)
        except UserError as error:
            return str(error)

    images = [
        (part, row) for part in parts if isinstance(part, ImageFiles) for row in range(len(part))
    ]
    images = images[rank::world_size]
    errors = []
    threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    with threads as pool, run.progress(rank=rank, total=len(images)) as bar:
        for start in range(0, len(images), 1000):  # a million at once would fill the memory
            for error in pool.map(error_of, images[start : start + 1000]):
                bar.update()
                if error:
                    errors.append(error)
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise UserError("; ".join(errors[:3]) + more)


class FileBatches(Batches):
    """Batches of images that lie in files; `workers` processes decode and augment them in advance.

    The augmentation is torchvision's: RandomResizedCrop, mirroring, RandAugment (2 operations of
    magnitude 9) and erasing (probability 0.25). The randomness of an image depends on (seed, step,
    place in the global batch) alone, so that neither the number of ranks nor that of workers
    changes a batch. Steps are to be asked for in ascending order; a jump starts new workers.
    """

    def __init__(self, *args, workers, **kwargs):
        super().__init__(*args, **kwargs)
        self.workers = workers
        self.next_step = None
        self.loader = None

    def _keys(self, step):
        """Yield for each step from `step` on the keys of this rank's images, see _Crops."""
        places = range(self.batch_size)[self.mine]
        while True:
            rows, drawn = self.my_rows(step)
            images = [(row, True) for row in rows.tolist()]
            images += [(row, False) for row in drawn.tolist()]
            yield [(step, place, row, is_real) for place, (row, is_real) in zip(places, images)]
            step += 1

    def _start_workers(self, step):
        self.loader = None  # ends the workers of before
        # The loader holds a copy of self. If it held self, which holds the loader, only the garbage
        # collector would end it, and that takes 5 seconds for each worker.
        keys = copy.copy(self)._keys(step)
        loader = torch.utils.data.DataLoader(
            _Crops(self.images, self.labels, self.synthetic, self.spec, self.seed),
            batch_sampler=keys,
            collate_fn=_collate,
            num_workers=self.workers,
            multiprocessing_context="fork" if self.workers else None,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        self.loader = iter(loader)

    def _make(self, step):
        if step != self.next_step:  # the first call of a run, fresh or resumed
            self._start_workers(step)
        self.next_step = step + 1
        try:
            buffer = torch.from_numpy(next(self.loader))
        except UserError as error:
            # The message of a worker's error begins with its traceback.
            message = str(error).rpartition("UserError: ")[2].strip()
            raise UserError(message) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            died = "a worker process died, mostly for want of memory"
            raise UserError(f"--workers {self.workers}: {died}; 0 does without them") from error
        return buffer.pin_memory() if self.device.type == "cuda" else buffer


def _collate(examples):
    """One buffer of the (image, label) pairs of a batch, as an array.

    Tensors of workers go through /dev/shm, which is small in many containers; arrays do not.
    """
    images, labels = zip(*examples)
    return packed(torch.stack(images), torch.stack(labels), pin=False).numpy()


class _Crops(torch.utils.data.Dataset):
    """One augmented image, (uint8 (H, W, C), label), per key (step, place, row, is_real)."""

    def __init__(self, images, labels, synthetic, spec, seed):
        self.images = images
        self.labels = labels
        self.synthetic = synthetic
        self.seed = seed
        self.transform = v2.Compose(
            [
                # On PIL images up to here, a third of the time that tensors take.
                v2.RandomResizedCrop(spec.image_size),
                v2.RandomHorizontalFlip(0.5 if spec.flip else 0.0),
                v2.RandAugment(num_ops=2, magnitude=9),
                v2.PILToTensor(),
                v2.RandomErasing(0.25, value=[round(255 * mean) for mean in spec.mean]),
            ]
        )

    def __getitem__(self, key):
        step, place, row, is_real = key
        if is_real:
            image = self.images.open(row)
            label = self.labels[row]
        else:
            images, labels = self.synthetic.gather(np.array([row]))
            image = Image.fromarray(images[0])
            label = torch.tensor(labels[0])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed_of(self.seed, "augment", f"{step}/{place}"))
            return self.transform(image).permute(1, 2, 0), label
