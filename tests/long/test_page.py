# SPDX-License-Identifier: Apache-2.0
"""The page for browsers in a real Chromium, in front of the real server and proxy."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import (
    MODEL_NAME,
    OFFLINE,
    PHOTO,
    ROOT,
    SAMPLES,
    Server,
    decode_cut_out,
    iou,
    processes_of,
    run_python,
    wait_for,
)
from front_door import KEY, NEEDS_NGINX, Proxy
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from client import InferenceError
from tools.launch import free_ports

CHROMIUM = shutil.which("chromium")
pytestmark = [NEEDS_NGINX, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")]

CAT = SAMPLES["cat"][0]
PERSON = SAMPLES["person"][0]
ANYTHING = re.findall(r"'(\w+)'", re.search(r"CLASSES = \[(.*?)\]", (ROOT / "deploy/page/app.js").read_text(), re.S)[1])
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy([server]) as proxy:
        yield proxy


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a proxy in a fresh browser, and checks for errors and foreign requests at the end."""
    contexts, complaints, foreign = [], [], []

    def open_page(proxy: Proxy, path: str = "/", **options: object) -> Page:
        context = browser.new_context(**{"viewport": WIDE} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("filechooser", lambda _: None)  # from now on; a click may come before the next listener works
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Security Policy" in said.text else None)
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        own = (proxy.url("http") + "/", f"blob:{proxy.url('http')}/")
        page.on("request", lambda request: None if request.url.startswith(own) else foreign.append(request.url))
        page.goto(proxy.url("http") + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []


def message(page: Page):
    return page.locator("#message")


def wait_for_cut_out(page: Page) -> None:
    """Return when the page shows the cut-out for the current settings."""
    expect(message(page)).to_have_text(re.compile("kept|Nothing found"), timeout=20_000)


def percent_kept(page: Page) -> int:
    wait_for_cut_out(page)
    return int(re.match(r"\d+", message(page).text_content())[0])


def choose(page: Page, *photos: Path) -> None:
    """Choose photos from the file picker, and wait for the cut-out of the first one."""
    page.set_input_files("#files", photos)
    wait_for_cut_out(page)


def set_threshold(page: Page, value: float) -> None:
    page.locator("#threshold").fill(str(value))


def download(page: Page) -> tuple[str, bytes]:
    """Return the name and the bytes of the file that the page offers."""
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download PNG").click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def assert_cut_out(png: bytes, server: Server, photo: Path, classes: str = ",".join(ANYTHING), threshold=0.6) -> None:
    """The file is the server's response to a client with the same request."""
    parameters = {"class_name": classes, "threshold": threshold, "format": "png"}
    expected = server.connect("http").infer(photo.read_bytes(), ("encoded",), parameters)["encoded"].tobytes()
    (pixels, alpha, kind), (expected_pixels, expected_alpha, _) = map(decode_cut_out, (png, expected))
    assert kind == "PNG"
    assert iou(alpha > 0, expected_alpha > 0) > 0.99
    both = (alpha > 0) & (expected_alpha > 0)
    assert abs(pixels[both].astype(int) - expected_pixels[both]).max() <= 3


def drop(page: Page, *files: tuple[str, bytes]) -> None:
    """Drag files over the page, and drop them."""
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, content] of files) {
                transfer.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt())], name));
            }
            return transfer;
        }""",
        [[name, base64.b64encode(content).decode()] for name, content in files],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#stage", event, {"dataTransfer": transfer})


def test_a_chosen_photo_is_cut_out_and_can_be_downloaded(open_page, proxy, server):
    page = open_page(proxy)
    choose(page, PERSON)
    assert 20 < percent_kept(page) < 60
    name, png = download(page)
    assert name == "orig.png"
    assert_cut_out(png, server, PERSON)


def test_several_photos_are_dropped_and_each_gets_its_own_cut_out(open_page, proxy, server):
    page = open_page(proxy)
    drop(page, ("a person.jpg", PHOTO), ("cat.jpeg", CAT.read_bytes()))
    wait_for_cut_out(page)
    name, png = download(page)
    assert name == "a person.png"
    assert_cut_out(png, server, PERSON)
    page.get_by_role("button", name="cat.jpeg").click()
    wait_for_cut_out(page)
    name, png = download(page)
    assert name == "cat.png"
    assert_cut_out(png, server, CAT)
    expect(page.get_by_role("button", name="cat.jpeg")).to_have_attribute("aria-current", "true")


def test_a_photo_in_the_clipboard_is_pasted(open_page, proxy):
    page = open_page(proxy)
    page.evaluate(
        """content => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt())], 'image.jpg'));
            dispatchEvent(new ClipboardEvent('paste', {clipboardData}));
        }""",
        base64.b64encode(PHOTO).decode(),
    )
    assert percent_kept(page) > 20


def test_a_photo_that_lies_on_its_side_is_shown_upright(open_page, proxy, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it to the right
    turned = tmp_path / "turned.jpg"
    Image.open(PERSON).resize((600, 400)).rotate(90, expand=True).save(turned, exif=exif, quality=95)
    page = open_page(proxy)
    choose(page, turned)
    shapes = page.evaluate(
        "['photo', 'cut-out'].map(id => document.getElementById(id)).map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert shapes == [[600, 400], [600, 400]]
    box = page.locator("#frame").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(1.5, rel=0.02)


def test_moving_the_threshold_asks_again_once_it_rests(open_page, proxy, server):
    page = open_page(proxy)
    choose(page, PERSON)
    before = percent_kept(page)
    requests = []
    page.on("request", lambda request: requests.append(request.url) if "infer" in request.url else None)
    page.locator("#threshold").focus()
    for _ in range(35):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#threshold-value")).to_have_text("0.95")
    wait_for_cut_out(page)
    assert percent_kept(page) < before
    assert 1 <= len(requests) <= 5
    assert_cut_out(download(page)[1], server, PERSON, threshold=0.95)
    set_threshold(page, 1)
    expect(message(page)).to_have_text("Nothing found: lower the threshold, or choose other classes.")


def test_chosen_classes_add_up(open_page, proxy, server):
    page = open_page(proxy)
    choose(page, CAT)
    chip = {name: page.get_by_role("checkbox", name=name, exact=True) for name in ("anything", "cat", "person")}
    expect(chip["anything"]).to_be_checked()
    chip["person"].press("Space")
    expect(chip["anything"]).not_to_be_checked()
    expect(message(page)).to_have_text(re.compile("Nothing found"))
    chip["cat"].press("Space")
    assert percent_kept(page) > 20
    set_threshold(page, 0.3)
    wait_for_cut_out(page)
    assert_cut_out(download(page)[1], server, CAT, "cat,person", 0.3)
    for name in ("cat", "person"):
        chip[name].press("Space")
    expect(chip["anything"]).to_be_checked()


def test_the_wipe_compares_the_photo_with_the_cut_out(open_page, proxy):
    page = open_page(proxy)
    choose(page, PERSON)
    frame = page.locator("#frame").bounding_box()

    def color(x: float, y: float) -> tuple[int, int, int]:
        """Return a color on the screen, at these shares of the photo's width and height."""
        screen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        return screen.getpixel((frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]))

    def drag_to(x: float) -> None:
        middle = frame["y"] + frame["height"] / 2
        page.mouse.move(frame["x"] + frame["width"] / 2, middle)
        page.mouse.down()
        page.mouse.move(frame["x"] + x * frame["width"], middle)
        page.mouse.up()

    pixels = Image.open(PERSON)
    original = pixels.getpixel((0.9 * pixels.width, 0.15 * pixels.height))  # not of the person
    assert min(color(0.9, 0.15)) > 200  # the checkerboard
    drag_to(0.97)
    assert max(abs(a - b) for a, b in zip(color(0.9, 0.15), original, strict=True)) < 60
    drag_to(0.02)
    assert min(color(0.1, 0.05)) > 200
    expect(page.locator("#wipe")).to_have_attribute("aria-valuetext", "2% photo")


def test_the_client_in_the_documentation_gets_the_mask(open_page, proxy, server):
    code = (ROOT / "docs" / "protocol.md").read_text().split("## From a browser")[1].split("## ")[0]
    code = "".join(line for line in code.splitlines(keepends=True) if line.startswith("    "))
    statement = 'import {infer} from "./triton.js";'
    assert statement in code
    page = open_page(proxy)
    page.evaluate("document.body.prepend(Object.assign(document.createElement('input'), {type: 'file', id: 'other'}))")
    page.set_input_files("#other", PERSON)
    code = code.replace(statement, 'const {infer} = await import("/triton.js");')
    shape, kept = page.evaluate(
        f"async () => {{ {code}\n return [[height, width], mask.data.filter(p => p).length]; }}"
    )
    expected = server.connect("http").infer(PHOTO, ("mask",), {"class_name": "person,dog", "threshold": 0.5})["mask"][0]
    assert (*shape,) == expected.shape
    assert kept == pytest.approx((expected > 0).sum(), rel=0.01)


def server_says(server: Server, photo: bytes, **parameters: str) -> str:
    with pytest.raises(InferenceError) as error:
        server.connect("http").infer(photo, ("encoded",), parameters)
    return str(error.value)


def test_a_rejection_is_explained_in_the_servers_words(open_page, proxy, server):
    page = open_page(proxy)
    for name, photo in (
        ("note.jpg", b"hello"),
        ("half.jpg", PHOTO[: len(PHOTO) // 2]),
        ("IMG.HEIC", b"\0\0\0\x18ftypheic"),
    ):
        drop(page, (name, photo))
        expect(message(page)).to_have_text(f"{name}: {server_says(server, photo).rstrip('.')}.")
        expect(page.get_by_role("button", name="Try again")).to_be_hidden()  # it would not help
        expect(page.get_by_role("link", name="Download PNG")).not_to_have_attribute("href", re.compile(""))
    choose(page, PERSON)  # the next one is not affected
    assert percent_kept(page) > 20


def test_files_that_cannot_be_sent_are_explained_before_they_are(open_page, proxy, tmp_path):
    page = open_page(proxy)
    requests = []
    page.on("request", lambda request: requests.append(request.url) if "infer" in request.url else None)
    large, changed = tmp_path / "large.bmp", tmp_path / "changed.jpg"
    with large.open("wb") as file:
        file.truncate(51_048_577)
    page.set_input_files("#files", large)
    expect(message(page)).to_have_text(re.compile(r"large.bmp: it is 52 MB, but the server's limit is 51 MB: .*\."))
    drop(page, ("empty.jpg", b""))
    expect(message(page)).to_have_text("empty.jpg: it is empty.")
    assert requests == []
    changed.write_bytes(PHOTO)
    choose(page, changed)
    changed.write_bytes(PHOTO + PHOTO)
    set_threshold(page, 0.7)
    expect(message(page)).to_have_text("changed.jpg: the browser cannot read it: is it a folder, or has it changed?")
    assert len(requests) == 1


def test_a_photo_of_the_largest_size_reaches_the_server(open_page, proxy, server, tmp_path):
    largest = tmp_path / "largest.jpg"
    largest.write_bytes(bytes(51_048_576))
    page = open_page(proxy)
    page.set_input_files("#files", largest)
    expect(message(page)).to_have_text(f"largest.jpg: {server_says(server, largest.read_bytes())}.")


HOSTILE = "<img src=x onerror=alert(1)>"


def test_html_in_file_names_and_errors_stays_text(open_page, proxy):
    page = open_page(proxy)
    images = page.locator("img").count()
    drop(page, (f"{HOSTILE}.jpg", PHOTO), (f"{HOSTILE}.txt", b"hello"))
    wait_for_cut_out(page)
    page.get_by_role("button", name=f"{HOSTILE}.txt").click()
    expect(message(page)).to_have_text(re.compile(re.escape(f"{HOSTILE}.txt: ")))
    # The server repeats the name of a class that it does not know.
    page.evaluate("name => document.querySelector('#classes input').value = name", HOSTILE)
    page.get_by_role("button", name=f"{HOSTILE}.jpg").click()
    expect(message(page)).to_have_text(re.compile(f"class_name.*{re.escape(HOSTILE)}"))
    assert page.locator("img").count() == images


def test_the_browser_itself_keeps_html_scripts_and_other_sites_out(browser, proxy):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(proxy.url("http"))
        blocked = page.evaluate(
            """() => new Promise(resolve => {
                const blocked = [];
                addEventListener('securitypolicyviolation', event => blocked.push(event.effectiveDirective));
                const attempts = [
                    () => { document.body.innerHTML = '<b>text</b>'; },
                    () => { eval('1'); },
                    () => { document.body.setAttribute('style', 'color: red'); },
                    () => fetch('http://127.0.0.2/'),
                    () => document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.2/'})),
                    () => document.body.append(Object.assign(document.createElement('iframe'), {src: '/'})),
                ];
                attempts.forEach(attempt => setTimeout(attempt));  // what a test runs itself is not restricted
                setTimeout(() => resolve(blocked), 500);
            })"""
        )
    expected = {"require-trusted-types-for", "style-src-attr", "connect-src", "img-src", "frame-src"}
    assert expected <= set(blocked) <= {*expected, "script-src"}


def test_while_the_server_is_busy_the_page_says_so_and_tries_again_by_itself(open_page, proxy, server):
    page = open_page(proxy)
    stopped, rejected = threading.Event(), threading.Event()

    def keep_busy() -> None:
        connection = server.connect("http")
        while not stopped.is_set():
            try:
                connection.infer(PHOTO, ("mask",))
            except InferenceError:
                rejected.set()

    with ThreadPoolExecutor(40) as pool:  # more than may wait and be in progress
        try:
            for _ in range(40):
                pool.submit(keep_busy)
            assert rejected.wait(30)
            page.set_input_files("#files", PERSON)
            expect(message(page)).to_have_text(
                "orig.jpg: the server is busy. The page retries automatically.", timeout=30_000
            )
        finally:
            stopped.set()
    assert percent_kept(page) > 20


def test_without_a_server_the_page_tries_for_a_minute_and_then_leaves_it_to_the_user(open_page):
    http_port, grpc_port, _ = free_ports()
    with Proxy([SimpleNamespace(http_port=http_port, grpc_port=grpc_port, model_name=MODEL_NAME)]) as proxy:
        page = open_page(proxy)
        page.clock.install()
        page.set_input_files("#files", PERSON)
        text = "orig.jpg: no server can be reached: send the photo again later."
        page.clock.run_for(1)
        expect(message(page)).to_have_text(f"{text} The page retries automatically.")

        def has_given_up() -> bool:
            page.clock.run_for(4000)
            return message(page).text_content() == text

        wait_for(has_given_up)
        expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_without_a_network_the_page_says_so_and_the_user_tries_again(open_page, proxy):
    page = open_page(proxy)
    page.context.set_offline(True)
    page.set_input_files("#files", PERSON)
    expect(message(page)).to_have_text("orig.jpg: the server cannot be reached: is it running, and are you online?")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    assert percent_kept(page) > 20


def test_a_key_is_asked_for_and_kept_in_memory_only(open_page, server):
    with Proxy([server], api_keys=f"{KEY} alice;\n") as proxy:
        page = open_page(proxy, f"/?key={KEY}&Authorization=Bearer%20{KEY}#{KEY}")  # which means nothing
        page.set_input_files("#files", PERSON)
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("This server requires an API key.")
        page.keyboard.press("Escape")
        expect(message(page)).to_have_text("orig.jpg: the server needs an API key.")
        page.get_by_role("button", name="Try again").click()
        key = page.get_by_label("Key", exact=True)
        for mistyped in ("", KEY[1:], KEY.upper(), "\u2603" * 64):
            key.fill(mistyped)
            page.keyboard.press("Enter")
            assert key.evaluate("element => element.validationMessage")
            expect(dialog).to_contain_text("This server requires an API key.")
        key.fill("0" * 64)
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The server does not accept this key.")
        expect(key).to_have_value("")
        key.fill(f" {KEY} ")
        page.keyboard.press("Enter")
        assert percent_kept(page) > 20
        set_threshold(page, 0.7)
        wait_for_cut_out(page)  # with the same key
        assert KEY not in page.content()
        stored = page.evaluate(
            "async () => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, await caches.keys(), "
            "await indexedDB.databases(), history.state])"
        )
        assert json.loads(stored) == [{}, {}, "", [], [], None]
        page.reload()
        page.set_input_files("#files", PERSON)
        expect(dialog).to_contain_text("This server requires an API key.")


def test_the_keyboard_is_enough_and_the_focus_is_visible(open_page, proxy):
    page = open_page(proxy)

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                break
        assert page.evaluate(
            """() => [document.activeElement, document.activeElement.nextElementSibling,
                      document.activeElement.parentElement]
                .some(element => element && (getComputedStyle(element).outlineStyle === 'solid'
                    || getComputedStyle(element, '::after').outlineStyle === 'solid'))"""
        ), selector

    tab_to("#files")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([PERSON, CAT])
    wait_for_cut_out(page)
    tab_to("#wipe")
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#wipe")).to_have_value("40")
    tab_to("#strip button[title='cat_orig.jpg']")
    page.keyboard.press("Enter")
    wait_for_cut_out(page)
    tab_to("#classes input[value=cat]")
    page.keyboard.press("Space")
    tab_to("#threshold")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#threshold-value")).to_have_text("0.59")
    wait_for_cut_out(page)
    tab_to("#more")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(CAT)
    expect(page.locator("#strip button")).to_have_count(3)
    wait_for_cut_out(page)
    tab_to("#download")
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    assert waiting.value.suggested_filename == "cat_orig.png"


CONTRASTS = """() => {
    const channels = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = color => {
        const linear = channels(color).map(c => c / 255)
            .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
        const [r, g, b] = linear;
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const background = element => {
        const color = getComputedStyle(element).backgroundColor;
        return channels(color)[3] === 0 ? background(element.parentElement) : color;
    };
    return [...document.querySelectorAll('h1, p, label, legend, output, a, button, .button')]
        .filter(element => element.checkVisibility() && element.textContent.trim())
        .map(element => {
            const [a, b] = [getComputedStyle(element).color, background(element)].map(luminance).sort((a, b) => b - a);
            return [element.textContent.trim().slice(0, 40), (a + .05) / (b + .05)];
        });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits_a_phone_and_is_readable_in_light_and_dark(open_page, proxy, scheme, size):
    page = open_page(proxy, viewport=size, color_scheme=scheme, has_touch=size is NARROW)
    for prepare in (lambda: None, lambda: choose(page, PERSON, CAT), lambda: drop(page, ("a-long-name" * 9, b"hello"))):
        prepare()
        expect(page.locator("#stage")).not_to_have_attribute("aria-busy", "true")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        contrasts = dict(page.evaluate(CONTRASTS))
        assert len(contrasts) > 20
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 19)"
    assert dark == (scheme == "dark")
    if size is NARROW:
        stage, controls = (page.locator(name).bounding_box() for name in ("#stage", "#controls"))
        assert stage["y"] + stage["height"] <= controls["y"]
        page.get_by_text("sofa").tap()
        expect(page.get_by_role("checkbox", name="sofa")).to_be_checked()


def test_motion_is_reduced_for_those_who_ask_for_it(open_page, proxy):
    page = open_page(proxy, reduced_motion="reduce")
    animation = "getComputedStyle(document.querySelector('#stage'), '::after').animationName"
    page.evaluate("document.querySelector('#stage').ariaBusy = 'true'")
    assert page.evaluate(animation) == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(animation) == "wait"


def test_make_page_serves_it_on_loopback_without_a_key_and_ctrl_c_stops_all(open_page, tmp_path):
    (port,) = free_ports(1)
    log, home = tmp_path / "log", Path(tempfile.mkdtemp(prefix="pytriton-"))
    home.chmod(0o755)  # nginx's workers drop root privileges
    environment = os.environ | OFFLINE | {"TORCH_HOME": str(tmp_path), "PYTRITON_HOME": str(home), "TMPDIR": str(home)}
    command = [sys.executable, "-m", "tools.page", "--port", str(port), "--threshold", "0.7"]
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            wait_for(lambda: f"Open http://127.0.0.1:{port} in a browser." in log.read_text(), timeout_s=90)
            page = open_page(SimpleNamespace(url=lambda _: f"http://127.0.0.1:{port}"))
            choose(page, PERSON)
            listening = [found for process in processes_of(home) for found in process.net_connections("inet")]
            assert {
                found.laddr.ip.removeprefix("::ffff:") for found in listening if found.status == psutil.CONN_LISTEN
            } == {"127.0.0.1"}
            second = run_python("-m", "tools.page", "--port", port)
            assert (second.returncode, second.stdout) == (2, "")
            assert re.fullmatch(
                rf"tools.page: cannot listen on port {port} .*: try make page PORT=8090\n", second.stderr
            )
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert processes_of(home) == []
    assert list(home.glob("page-*")) == []
    shutil.rmtree(home)


@pytest.mark.parametrize("killed", ["tools.page", "nginx"])
def test_what_is_left_of_make_page_stops_if_a_part_is_killed(tmp_path, killed):
    (port,) = free_ports(1)
    log, home = tmp_path / "log", Path(tempfile.mkdtemp(prefix="pytriton-"))
    environment = os.environ | OFFLINE | {"TORCH_HOME": str(tmp_path), "PYTRITON_HOME": str(home), "TMPDIR": str(home)}
    command = [sys.executable, "-m", "tools.page", "--port", str(port)]
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file) as process,
    ):
        wait_for(lambda: "Open http" in log.read_text(), timeout_s=90)
        (nginx,) = (child for child in psutil.Process(process.pid).children() if child.name() == "nginx")
        workers = nginx.children()
        (nginx if killed == "nginx" else process).kill()
        status = process.wait(timeout=60)
    if killed == "nginx":
        assert status == 1
        assert log.read_text().splitlines()[-1] == "tools.page: nginx ended with status 137"
    assert psutil.wait_procs([nginx, *workers], timeout=20)[1] == []
    wait_for(lambda: processes_of(home) == [])
    assert list(home.glob("workspace_*")) == []
    shutil.rmtree(home)
