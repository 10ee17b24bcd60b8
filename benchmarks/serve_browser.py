"""The web demo in a real browser: starts ``skipvision serve``, drives headless Chromium, says what it saw.

Needs the extra ``serve``, selenium, Chromium and its driver. Every check is a line; the exit status is 1 if one fails.

    python benchmarks/serve_browser.py --model outputs/demo/model --data outputs/demo/data --out outputs/serve
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

Browser = Any  # selenium's; imported where it is used, because the extra does not bring it


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    records = json.loads((args.data / "heldout.json").read_text())
    checks = Checks()
    with serving(args) as address:
        for each in (look, wrong_files, chat, stop, keyboard):
            with browser() as driver:
                driver.get(address)
                until(driver, "return document.getElementById('plan').options.length >= 2")
                each(driver, checks, args, records)
        together(address, checks, args, records)
    sys.exit(1 if checks.failed else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--data", type=Path, required=True, help="an embedded data set: heldout.json and images/")
    parser.add_argument("--out", type=Path, default=Path("outputs/serve"), help="for pictures of the page")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="questions of each user")
    return parser.parse_args()


class Checks:
    """What was looked at, and how much of it was wrong."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, is_right: bool, seen: object = "") -> None:
        self.failed += not is_right
        print(f"{'ok  ' if is_right else 'FAIL'}  {what}{f': {seen}' if seen != '' else ''}", flush=True)


@contextmanager
def serving(args: argparse.Namespace) -> Iterator[str]:
    """The command in a process of its own: its address."""
    command = [
        *(sys.executable, "-c", "from skipvision_train.cli import main; main()", "serve"),
        *(f"checkpoint={args.model}", "port=0", "device=cpu", "max_new_tokens=64", "limits.upload_mb=1"),
        *("limits.questions_per_minute=1000", "limits.uploads_per_minute=1000", "limits.uploads=32"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://\S+", line):
            break
    else:
        sys.exit("".join(lines))
    rest = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    rest.start()
    try:
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)
        rest.join(5)
        if problems := [line for line in lines if "Traceback" in line or "ERROR" in line]:
            print("the server logged:", *problems, sep="\n")


@contextmanager
def browser(width: int = 800, height: int = 900) -> Iterator[Browser]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService("/usr/bin/chromedriver") if Path("/usr/bin/chromedriver").exists() else None
    driver = webdriver.Chrome(options=options, service=service) if service else webdriver.Chrome(options=options)
    driver.set_script_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def until(driver: Browser, script: str, seconds: float = 60) -> Any:
    """What the script returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := driver.execute_script(script)):
        if time.monotonic() > end:
            raise TimeoutError(script)
        time.sleep(0.02)
    return found


def find(driver: Browser, name: str) -> Any:
    return driver.find_element("css selector", name)


def upload(driver: Browser, *files: Path) -> None:
    find(driver, "#file").send_keys("\n".join(str(file.resolve()) for file in files))
    until(driver, "return !document.getElementById('status').textContent && !document.getElementById('file').value")


def ask(driver: Browser, text: str, plan: str | None = None) -> str:
    """The answer, when it is whole."""
    if plan is not None:
        find(driver, f"#plan option[value='{plan}']").click()
    count = len(driver.find_elements("css selector", ".figures"))
    find(driver, "#text").send_keys(text)
    find(driver, "#send").click()
    until(driver, f"return document.querySelectorAll('.figures').length > {count}")
    return driver.find_elements("css selector", ".words")[-1].text


def picture(args: argparse.Namespace, record: dict[str, Any]) -> Path:
    return args.data / "images" / record["image"]


def question(record: dict[str, Any]) -> str:
    return record["conversations"][0]["value"].replace("<image>", "").strip()


def messages(driver: Browser) -> list[str]:
    """What the browser complained about; answers with an error status are expected ones."""
    return [entry["message"] for entry in driver.get_log("browser") if "status of 4" not in entry["message"]]


def chat(driver: Browser, checks: Checks, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Upload, ask, the stream, another plan, history, a reload."""
    driver.execute_script(
        "window.seen = []; new MutationObserver(() => { const all = document.querySelectorAll('.words');"
        "if (all.length) window.seen.push(all[all.length - 1].textContent); })"
        ".observe(document.getElementById('chat'), {childList: true, subtree: true, characterData: true});"
    )
    for number, (record, plan) in enumerate(zip(records[:4], ("own", "dense", "own", "dense"), strict=True)):
        upload(driver, picture(args, record))
        answer = ask(driver, question(record), plan)
        by = driver.find_elements("css selector", ".by")[-1].text
        checks(
            f"question {number + 1} has an answer under its plan", answer != "" and by == f"plan {plan}", (answer, by)
        )
    text_record = next(record for record in records if record["task"] == "text")
    find(driver, "#new").click()
    until(driver, "return !document.querySelector('article')")
    upload(driver, picture(args, text_record))
    driver.execute_script("window.seen = []")
    long = ask(driver, question(text_record), "own")
    steps = list(dict.fromkeys(driver.execute_script("return window.seen")))
    checks("the answer grows on the page", len(steps) > 2 and all(long.startswith(s) for s in steps[:-1]), steps)
    figures = driver.find_elements("css selector", ".figures")[-1]
    for name in ("First token", "Decode", "KV memory", "Prefill", "Waited"):
        checks(f"{name} is shown", name in figures.text)
    kinds = [item.text for item in figures.find_elements("css selector", ".kinds li")]
    checks("tokens are shown by kind", len(kinds) >= 4, kinds)
    before = [element.text for element in driver.find_elements("css selector", "article")]
    driver.refresh()
    until(driver, f"return document.querySelectorAll('article').length === {len(before)}")
    after = [element.text for element in driver.find_elements("css selector", "article")]
    checks("a reload shows the same chat", before == after)
    checks("pictures of the chat are shown", until(driver, LOADED))
    checks("Chromium complains about nothing", not (found := messages(driver)), found)


LOADED = """const all = [...document.querySelectorAll('article img')];
return all.length && all.every((image) => image.complete && image.naturalWidth > 0)"""


def wrong_files(driver: Browser, checks: Checks, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """No image, a large one, one of many pixels; also what the page itself would have refused."""
    folder = args.out / "files"
    folder.mkdir(exist_ok=True)
    (folder / "notes.png").write_text("no image at all")
    (folder / "large.jpg").write_bytes(bytes(3 * 2**20))
    Image.new("1", (12_000, 12_000)).save(folder / "pixels.png")
    for name, message in (("notes.png", "no image that can be decoded"), ("large.jpg", "larger than 1 MiB")):
        upload(driver, folder / name)
        seen = until(driver, "return document.getElementById('problem').textContent")
        checks(f"{name} is refused", seen.startswith(name) and message in seen, seen)
    upload(driver, folder / "pixels.png")
    seen = until(driver, "return document.getElementById('problem').textContent")
    checks("pixels.png is refused", "pixels" in seen, seen)
    shoot(driver, args.out / "refused.png", 800, "light")
    script = (
        "const done = arguments[0]; limits.upload_mb = 1000; upload([new File([new Uint8Array(3 << 20)], 'x.png')])"
    )
    driver.execute_async_script(script + ".then(done)")
    seen = find(driver, "#problem").text
    checks("the server itself refuses a large file", seen.startswith("x.png: larger than 1 MiB"), seen)
    driver.delete_all_cookies()
    upload(driver, picture(args, records[0]))
    seen = find(driver, "#problem").text
    checks("an expired session is said", "expired" in seen, seen)
    upload(driver, picture(args, records[0]))
    checks("and the next upload works", len(driver.find_elements("css selector", "#images li")) == 1)
    hostile = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> <image>"
    ask(driver, hostile)
    shown = find(driver, "article.question p").text
    checks("HTML in a text stays text", shown == hostile and driver.title != "broken")


def stop(driver: Browser, checks: Checks, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Stop while the model works; whatever came first, the page must be usable afterwards."""
    upload(driver, picture(args, records[0]))
    find(driver, "#text").send_keys(question(records[0]))
    find(driver, "#send").click()
    driver.execute_script("document.getElementById('stop').click()")
    until(driver, "return !document.getElementById('send').hidden")
    seen = [element.text for element in driver.find_elements("css selector", ".by")], find(driver, "#problem").text
    answer = ask(driver, "" if find(driver, "#text").get_attribute("value") else question(records[0]))
    checks("after a stop the next question is answered", answer != "", (*seen, answer))


def keyboard(driver: Browser, checks: Checks, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Everything is reached with Tab, Enter asks."""
    from selenium.webdriver.common.keys import Keys

    upload(driver, picture(args, records[0]))
    reached = []
    for _ in range(8):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        active = driver.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text)
    checks("Tab reaches every control", {"plan", "new", "chat", "Remove", "add", "text"} <= set(reached), reached)
    find(driver, "#text").send_keys(question(records[0]) + Keys.ENTER)
    until(driver, "return document.querySelectorAll('.figures').length === 1")
    checks("the question's field has the focus again", driver.switch_to.active_element.get_attribute("id") == "text")


def look(driver: Browser, checks: Checks, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Pictures of the page, wide and narrow, light and dark; nothing may stick out."""
    shoot(driver, args.out / "empty_800_light.png", 800, "light")
    upload(driver, picture(args, records[0]))
    ask(driver, question(records[0]), "own")
    upload(driver, picture(args, records[4]), picture(args, records[1]))
    ask(driver, "What does the text say?", "dense")
    upload(driver, picture(args, records[2]))
    find(driver, "#text").send_keys("How many objects are there?")
    for width in (800, 390):
        for scheme in ("light", "dark"):
            shoot(driver, args.out / f"chat_{width}_{scheme}.png", width, scheme)
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        checks(f"nothing sticks out at {width} px", wide <= width, wide)


def shoot(driver: Browser, file: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.execute_script("const chat = document.getElementById('chat'); chat.scrollTop = chat.scrollHeight")
    driver.save_screenshot(str(file))


def together(address: str, checks: Checks, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Users at once, each with questions of its own; the answers must be those that it gets alone."""
    mine = [records[user :: args.users][: args.rounds] for user in range(args.users)]
    alone = [user(address, args, own, lambda: None)[0] for own in mine]
    barrier = threading.Barrier(args.users)
    with ThreadPoolExecutor(args.users) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda own: user(address, args, own, barrier.wait), mine))
        took = time.perf_counter() - start
    first = sorted(t for _, times, _ in found for t in times)
    whole = sorted(t for _, _, times in found for t in times)
    answers = [text for texts, _, _ in found for text in texts]
    expected = [text for texts in alone for text in texts]
    checks(f"{args.users} users at once: {len(answers)} answers", all(answers), f"{took:.1f} s in all")
    checks("each is the user's own, as asked alone", answers == expected, f"{len(set(expected))} different ones")
    truth = [record["conversations"][1]["value"] for own in mine for record in own]
    print(f"      right answers: {sum(a == t for a, t in zip(answers, truth, strict=True))} of {len(truth)}")
    for name, times in (("first word", first), ("whole answer", whole)):
        median, late = statistics.median(times), times[int(0.95 * (len(times) - 1))]
        print(f"      {name}: median {median:.2f} s, 95 % within {late:.2f} s, longest {times[-1]:.2f} s")


def user(
    address: str, args: argparse.Namespace, own: list[dict[str, Any]], ready: Callable[[], object]
) -> tuple[list[str], list[float], list[float]]:
    """One visitor without a browser: answers, seconds to the first word, seconds to the end."""
    answers, first, whole = [], [], []
    with httpx.Client(base_url=address, headers={"Origin": address}, timeout=300) as client:
        client.get("/api/chat").raise_for_status()
        for record in own:
            client.post("/api/new").raise_for_status()
            sent = client.post("/api/images", content=picture(args, record).read_bytes()).raise_for_status().json()
            asked = {"text": question(record), "plan": "own", "images": [sent["id"]]}
            ready()
            start = time.perf_counter()
            with client.stream("POST", "/api/ask", json=asked) as response:
                response.raise_for_status()
                name, came = "", None
                for line in response.iter_lines():
                    name = line.removeprefix("event: ") if line.startswith("event: ") else name
                    if name == "piece" and came is None:
                        came = time.perf_counter() - start
                    if line.startswith("data: ") and name in ("done", "error"):
                        answers.append(json.loads(line.removeprefix("data: ")).get("text", ""))
            whole.append(time.perf_counter() - start)
            first.append(came if came is not None else whole[-1])
    return answers, first, whole


if __name__ == "__main__":
    main()
