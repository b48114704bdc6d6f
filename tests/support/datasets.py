"""LeRobot datasets of versions 2.1 and 3.0, written without LeRobot. Pictures show their frame's
number."""

import json

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS = 10


EPISODES = [(40, "Pick."), (30, "Place."), (50, "Pick."), (20, "Place.")]  # frames, task


CAMERAS = {"front": 0, "wrist": 255}  # the wrist's pictures are inverted


def picture(number, camera):
    """[48, 64, 3]: eight bits as blocks, black or white, under an orange edge."""
    bits = (
        np.array([number >> k & 1 for k in range(8)], np.uint8).reshape(2, 4) * 255
        ^ CAMERAS[camera]
    )
    image = np.repeat(np.kron(bits, np.ones((24, 16), np.uint8))[..., None], 3, -1)
    image[:4] = 255, 128, 0
    return image


def write_video(path, numbers, camera, fps=FPS):
    """Keyframes 25 frames apart, some frames before them stored behind them; the index in front, so
    that a cut file still opens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        options = {"g": "25", "bf": "8", "sc_threshold": "0", "x264-params": "open-gop=1:b-adapt=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in numbers:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(picture(number, camera), format="rgb24"))
            )
        container.mux(stream.encode())


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_dataset(root, version="v3.0", episodes=EPISODES, kind="video"):
    """The frames are counted over all episodes; state and pictures show the number. In v3.0, two
    episodes a file."""
    kinds = dict.fromkeys(CAMERAS, kind)
    features = {
        f"observation.images.{c}": {"dtype": kind, "shape": [48, 64, 3]}
        for c, kind in kinds.items()
    }
    features |= {"observation.state": {"dtype": "float32", "shape": [6]}}
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000}
    v3, first = version == "v3.0", 0
    tasks, metas, data, videos = sorted({task for _, task in episodes}), [], {}, {}
    names = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    if not v3:
        names = {
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        }
    for index, (length, task) in enumerate(episodes):
        numbers = range(first, first + length)
        at = {
            "episode_chunk": 0,
            "episode_index": index,
            "chunk_index": 0,
            "file_index": index // 2,
        }
        meta = {"episode_index": index, "length": length, "tasks": [task]}
        meta |= {"data/chunk_index": 0, "data/file_index": index // 2} if v3 else {}
        rows = data.setdefault(names["data_path"].format(**at), [])
        for frame, number in enumerate(numbers):
            rows.append(
                {"episode_index": index, "frame_index": frame, "timestamp": np.float32(frame / FPS)}
            )
            rows[-1] |= {
                "task_index": tasks.index(task),
                "observation.state": np.float32([number, 0, 0, 0, 0, 1]),
            }
        for camera in CAMERAS:
            key = f"observation.images.{camera}"
            if kind == "image":
                for number, row in zip(numbers, rows[-length:], strict=True):
                    png = cv2.imencode(".png", picture(number, camera)[..., ::-1])[1].tobytes()
                    row[key] = {"bytes": png, "path": f"frame-{number:06d}.png"}
                continue
            shown = videos.setdefault((names["video_path"].format(video_key=key, **at), camera), [])
            if v3:
                meta |= {f"videos/{key}/{k}_index": at[f"{k}_index"] for k in ("chunk", "file")}
                meta |= {f"videos/{key}/from_timestamp": len(shown) / FPS}
            shown += numbers
        metas.append(meta)
        first += length
    write_json(root / "meta/info.json", info | names)
    for name, rows in data.items():
        write_parquet(root / name, rows)
    for (name, camera), numbers in videos.items():
        write_video(root / name, numbers, camera)
    if v3:
        write_parquet(root / "meta/episodes/chunk-000/file-000.parquet", metas)
        write_parquet(
            root / "meta/tasks.parquet",
            [{"task_index": i, "__index_level_0__": t} for i, t in enumerate(tasks)],
        )
    else:
        write_json(root / "meta/episodes.jsonl", *metas)
        write_json(
            root / "meta/tasks.jsonl", *({"task_index": i, "task": t} for i, t in enumerate(tasks))
        )
    return root
