// SPDX-License-Identifier: Apache-2.0
// The page: shows a photo and its cut-out side by side. Data from files and the server becomes text or pixels, never HTML.
import {infer, TritonError} from './triton.js';

// The contract, as in server.py: the model, its classes without the background, and the largest photo.
const MODEL = 'ResNet101';
const CLASSES = [
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog', 'horse',
    'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
];
const MAX_PHOTO_BYTES = 51_048_576;

const PAUSE_MS = 200;  // between the last change of the settings and the request
const BUSY = [429, 503];  // statuses of an overloaded server or proxy
const BUSY_FOR_MS = 60_000;  // how long the page retries by itself

const $ = id => document.getElementById(id);
const photos = [];  // {file, url, button, cutOut: {settings, name, url, kept} or undefined}
let shown;  // one of them
let updating = new AbortController();  // aborts the update in progress
let apiKey = '';  // in memory only

// The cut-out

/** Get the cut-out of the photo that is shown. A newer call replaces an older one. */
async function update(pause_ms = 0) {
    updating.abort();
    const {signal} = updating = new AbortController();
    const photo = shown, settings = chosenSettings();
    if (!photo) {
        return;
    }
    showCutOut(photo);
    if (photo.cutOut?.settings === settings.text) {
        return;
    }
    $('stage').setAttribute('aria-busy', 'true');
    say(`Looking at ${photo.file.name} …`);
    try {
        await sleep(pause_ms, signal);
        const png = await cutOut(photo.file, settings.parameters, signal);
        const kept = await keptShare(png);
        signal.throwIfAborted();
        if (photo.cutOut) {
            URL.revokeObjectURL(photo.cutOut.url);
        }
        const name = `${photo.file.name.replace(/\.[^.]*$/, '')}.png`;
        photo.cutOut = {settings: settings.text, name, url: URL.createObjectURL(png), kept};
        showCutOut(photo);
    } catch (error) {
        if (!signal.aborted) {
            say(sentence(error, photo.file), 'problem', mayPassLater(error));
        }
    } finally {
        if (!signal.aborted) {
            $('stage').removeAttribute('aria-busy');
        }
    }
}

/** Return the cut-out as a PNG. Waits while the server is busy, and asks for a key if the server requires one. */
async function cutOut(file, parameters, signal) {
    await checkFile(file);
    const image = {name: 'image', datatype: 'UINT8', shape: [1, file.size], data: file};
    const began = performance.now();
    for (let attempt = 0; ; attempt++) {
        const headers = apiKey ? {Authorization: `Bearer ${apiKey}`} : {};
        try {
            const {encoded} = await infer(MODEL, [image], ['encoded'], {parameters, headers, signal});
            return new Blob([encoded.data], {type: 'image/png'});
        } catch (error) {
            if (error.status === 403) {
                await askForKey();
                signal.throwIfAborted();
            } else if (BUSY.includes(error.status) && performance.now() - began < BUSY_FOR_MS) {
                say(`${sentence(error, file)} The page retries automatically.`);
                await sleep(Math.min(8000, 500 * 2 ** attempt) * (0.5 + Math.random() / 2), signal);
            } else {
                throw error;
            }
        }
    }
}

async function checkFile(file) {
    const megabytes = bytes => `${Math.ceil(bytes / 1e6)} MB`;
    if (file.size > MAX_PHOTO_BYTES) {
        throw new Problem(`it is ${megabytes(file.size)}, but the server's limit is ${megabytes(MAX_PHOTO_BYTES - 1e6)}: ` +
                          'save it as a JPEG, or scale it down.');
    }
    try {
        await file.slice(0, 1).arrayBuffer();
    } catch {
        throw new Problem('the browser cannot read it: is it a folder, or has it changed?');
    }
    if (!file.size) {
        throw new Problem('it is empty');
    }
}

/** Return the share of the pixels that are not transparent, from a small copy. */
async function keptShare(png) {
    const bitmap = await createImageBitmap(png);
    const canvas = document.createElement('canvas');
    const scale = Math.min(1, 512 / Math.max(bitmap.width, bitmap.height));
    canvas.width = Math.max(1, bitmap.width * scale);
    canvas.height = Math.max(1, bitmap.height * scale);
    const context = canvas.getContext('2d');
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
    let sum = 0;
    for (let alpha = 3; alpha < data.length; alpha += 4) {
        sum += data[alpha];
    }
    return sum / 255 / (data.length / 4);
}

function chosenSettings() {
    const names = classBoxes.filter(box => box.checked).map(box => box.value);
    const parameters = {class_name: names.join(), threshold: Number($('threshold').value), format: 'png'};
    return {parameters, text: JSON.stringify(parameters)};
}

// Messages to the user

/** A problem with a file that the page itself detects. */
class Problem extends Error {}

class KeyMissing extends Error {}

function mayPassLater(error) {
    const isTheRequests = error instanceof TritonError && (error.status < 429 || error.message.includes('InvalidRequest'));
    return !(error instanceof Problem || isTheRequests);
}

function say(text, kind = '', offersToTryAgain = false) {
    $('message').textContent = text;
    $('message').className = kind;
    $('again').hidden = !offersToTryAgain;
}

/** Return an error as a sentence. PyTriton wraps the server's sentences in tracebacks. */
function sentence(error, file) {
    let text = error.message;
    if (error instanceof TritonError) {
        const [, found] = /(?:InvalidRequest|InferenceFailed): (.*)/.exec(text) ?? [];
        text = text.includes('Exceeds maximum queue size') ? 'the server is busy'
            : found ?? text.split('\nAt:\n')[0].trim().split('\n').pop();
    } else if (!(error instanceof Problem || error instanceof KeyMissing)) {
        text = 'the server cannot be reached: is it running, and are you online?';
        console.error(error);
    }
    text = text.trim();
    return `${file.name}: ${text}${/[.?!]$/.test(text) ? '' : '.'}`;
}

let asking;  // a promise while the dialog is open

/** Ask for an API key. Throws KeyMissing if the user cancels. */
function askForKey() {
    asking ??= new Promise((resolve, reject) => {
        const dialog = $('key-dialog');
        $('key-reason').textContent = apiKey ? 'The server does not accept this key.' : 'This server requires an API key.';
        apiKey = '';
        $('key').value = '';
        dialog.returnValue = '';  // if Escape closes it
        dialog.showModal();
        dialog.addEventListener('close', () => {
            asking = undefined;
            if (dialog.returnValue === 'ok') {
                apiKey = $('key').value.trim();
                $('key').value = '';
                resolve();
            } else {
                reject(new KeyMissing('the server needs an API key'));
            }
        }, {once: true});
    });
    return asking;
}

// The photo and the wipe

function show(photo) {
    shown = photo;
    for (const other of photos) {
        other.button.setAttribute('aria-current', String(other === photo));
    }
    $('welcome').hidden = true;
    $('frame').hidden = $('more').hidden = false;
    $('strip').hidden = photos.length < 2;
    $('photo').hidden = false;
    $('photo').src = photo.url;
    update();
}

function showCutOut({cutOut}) {
    $('frame').classList.toggle('photo-only', !cutOut);
    $('cut-out').hidden = !cutOut;
    const download = $('download');
    if (!cutOut) {
        $('cut-out').removeAttribute('src');
        download.removeAttribute('href');
        download.setAttribute('aria-disabled', 'true');
        return;
    }
    $('cut-out').src = download.href = cutOut.url;
    download.download = cutOut.name;
    download.removeAttribute('aria-disabled');
    const percent = cutOut.kept > 0 && cutOut.kept < 0.01 ? 'less than 1' : Math.round(100 * cutOut.kept);
    say(cutOut.kept ? `${percent}% of the photo is kept.` : 'Nothing found: lower the threshold, or choose other classes.');
}

function setSplit(percent) {
    $('wipe').value = percent;
    $('frame').style.setProperty('--split', `${$('wipe').value}%`);
    $('wipe').setAttribute('aria-valuetext', `${$('wipe').value}% photo`);
}

function fit({target: {naturalWidth, naturalHeight}}) {
    $('frame').style.setProperty('--ratio', naturalWidth / naturalHeight);
}

$('photo').addEventListener('load', fit);
$('cut-out').addEventListener('load', fit);  // the server decides about the orientation
$('photo').addEventListener('error', () => { $('photo').hidden = true; });  // HEIC in most browsers; the server explains
$('wipe').addEventListener('input', () => setSplit($('wipe').value));
$('frame').addEventListener('pointerdown', event => {
    event.preventDefault();
    $('frame').setPointerCapture(event.pointerId);
    $('wipe').focus({focusVisible: false});
    drag(event);
});
$('frame').addEventListener('pointermove', drag);

function drag(event) {
    if ($('frame').hasPointerCapture(event.pointerId)) {
        const {left, width} = $('frame').getBoundingClientRect();
        setSplit(100 * (event.clientX - left) / width);
    }
}

// Photos come from the file picker, by drop, or from the clipboard.

let thumbnails = Promise.resolve();  // one after another, because a decoded photo is large

function add(files) {
    const added = Array.from(files, file => {
        const photo = {file, url: URL.createObjectURL(file), button: document.createElement('button')};
        photo.button.type = 'button';
        photo.button.title = file.name;
        photo.button.textContent = file.name;
        photo.button.addEventListener('click', () => show(photo));
        thumbnails = thumbnails.then(() => drawThumbnail(photo));
        const item = document.createElement('li');
        item.append(photo.button);
        $('strip').append(item);
        return photo;
    });
    photos.push(...added);
    if (added.length) {
        show(added[0]);
    }
}

async function drawThumbnail({file, button}) {
    try {
        const bitmap = await createImageBitmap(file, {resizeWidth: 160, resizeQuality: 'medium'});
        const canvas = document.createElement('canvas');
        canvas.width = bitmap.width;
        canvas.height = bitmap.height;
        canvas.getContext('bitmaprenderer').transferFromImageBitmap(bitmap);
        canvas.setAttribute('role', 'img');
        canvas.setAttribute('aria-label', file.name);
        button.replaceChildren(canvas);
    } catch {
        // The button keeps the file's name.
    }
}

$('more').addEventListener('click', () => $('files').click());
$('files').addEventListener('change', () => {
    add($('files').files);
    $('files').value = '';  // so that the same file can be chosen again
});
for (const type of ['dragenter', 'dragover', 'dragleave', 'drop']) {
    addEventListener(type, event => {
        event.preventDefault();
        const inside = type === 'dragenter' || type === 'dragover' || event.relatedTarget !== null && type === 'dragleave';
        document.body.classList.toggle('dropping', inside && event.dataTransfer.types.includes('Files'));
        if (type === 'drop') {
            add(event.dataTransfer.files);
        }
    });
}
addEventListener('paste', event => add(event.clipboardData.files));

// The settings

function classBox(name, value) {
    const label = document.createElement('label'), box = document.createElement('input');
    Object.assign(box, {type: 'checkbox', value, className: 'hidden'});
    label.append(box, name);
    $('classes').append(label);
    return box;
}

const anything = classBox('anything', CLASSES.join());
const classBoxes = [anything, ...CLASSES.map(name => classBox(name, name))];
anything.checked = true;

$('classes').addEventListener('change', ({target}) => {
    if (target === anything) {
        classBoxes.forEach(box => { box.checked = box === anything; });
    } else {
        anything.checked = !classBoxes.some(box => box !== anything && box.checked);
    }
    update(PAUSE_MS);
});
$('threshold').addEventListener('input', () => {
    showThreshold();
    update(PAUSE_MS);
});
$('controls').addEventListener('submit', event => event.preventDefault());
$('again').addEventListener('click', () => update());

function showThreshold() {
    $('threshold-value').textContent = Number($('threshold').value).toFixed(2);
}

/** Wait. Throws if the signal aborts. */
function sleep(ms, signal) {
    return new Promise((resolve, reject) => {
        signal.addEventListener('abort', () => reject(signal.reason), {once: true});
        setTimeout(resolve, ms);
    });
}

showThreshold();  // a browser may restore the settings after a reload
setSplit(50);
