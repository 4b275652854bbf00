// SPDX-License-Identifier: Apache-2.0
/**
 * A client of Triton Inference Server for browsers, in one file without dependencies.
 *
 *     import {infer} from './triton.js';
 *
 *     const image = {name: 'image', datatype: 'UINT8', shape: [1, file.size], data: file};
 *     const {mask} = await infer('ResNet101', [image], ['mask'], {parameters: {class_name: 'cat'}});
 *     mask.shape;  // [1, H, W]
 *     mask.data;   // Uint8Array
 *
 * Triton sends no CORS headers, so the page must come from the same origin as Triton: put a proxy in front of both.
 *
 * A request is JSON that describes the tensors, followed by the bytes of the inputs. The header
 * Inference-Header-Content-Length contains the length of the JSON. A response has the same form. Numbers are
 * little-endian, as in the typed arrays of every browser.
 */

const ARRAYS = {
    BOOL: Uint8Array, UINT8: Uint8Array, UINT16: Uint16Array, UINT32: Uint32Array, UINT64: BigUint64Array,
    INT8: Int8Array, INT16: Int16Array, INT32: Int32Array, INT64: BigInt64Array, FP32: Float32Array, FP64: Float64Array,
};
const HEADER_LENGTH = 'Inference-Header-Content-Length';

/** An error from Triton, or from a proxy in front of it. `status` is the HTTP status. */
export class TritonError extends Error {
    constructor(status, message) {
        super(message);
        this.name = 'TritonError';
        this.status = status;
    }
}

/**
 * Send one inference request.
 *
 * @param {string} model
 * @param {{name: string, datatype: string, shape: number[], data: Blob | ArrayBuffer | ArrayBufferView}[]} inputs
 * @param {string[]} outputs names of the outputs to return
 * @param {object} [options]
 * @param {Object<string, string | number | boolean>} [options.parameters] the request's parameters
 * @param {Object<string, string>} [options.headers] HTTP headers to add, such as Authorization
 * @param {AbortSignal} [options.signal] aborts the request
 * @returns {Promise<Object<string, {datatype: string, shape: number[], data: ArrayBufferView}>>} the outputs by name. `data`
 *     is a typed array, or the bytes if JavaScript has no array of this type (FP16, BF16, BYTES).
 * @throws {TritonError} if the server or the proxy rejects the request
 * @throws {TypeError} if the server cannot be reached
 */
export async function infer(model, inputs, outputs, {parameters = {}, headers = {}, signal} = {}) {
    const description = JSON.stringify({
        inputs: inputs.map(({name, datatype, shape, data}) => (
            {name, datatype, shape, parameters: {binary_data_size: data.size ?? data.byteLength}}
        )),
        outputs: outputs.map(name => ({name, parameters: {binary_data: true}})),
        parameters,
    });
    const json = new TextEncoder().encode(description);
    const response = await fetch(`/v2/models/${encodeURIComponent(model)}/infer`, {
        method: 'POST',
        headers: {...headers, [HEADER_LENGTH]: json.length, 'Content-Type': 'application/octet-stream'},
        body: new Blob([json, ...inputs.map(input => input.data)]),  // files are read while they are sent
        signal,
    });
    if (!response.ok) {
        throw new TritonError(response.status, errorMessage(await response.text()) || `HTTP status ${response.status}`);
    }
    return readTensors(await response.arrayBuffer(), Number(response.headers.get(HEADER_LENGTH)));
}

function errorMessage(body) {
    try {
        return JSON.parse(body).error;
    } catch {
        return '';  // not from Triton, but for example from another proxy
    }
}

function readTensors(body, jsonLength) {
    const description = JSON.parse(new TextDecoder().decode(body.slice(0, jsonLength)));
    const tensors = {};
    let start = jsonLength;
    for (const {name, datatype, shape, parameters} of description.outputs) {
        const end = start + parameters.binary_data_size;
        tensors[name] = {datatype, shape, data: new (ARRAYS[datatype] ?? Uint8Array)(body.slice(start, end))};
        start = end;
    }
    return tensors;
}
