// SPDX-License-Identifier: Apache-2.0
// Reads inference requests before Triton does, because Triton 2.51 trusts what they say: see docs/security.md. It refuses
// what it does not know. nginx.conf calls http() and grpc() once the body is complete; it is a file then, of which this reads
// and writes only the beginning.
import fs from 'fs';

// The contract, as in server.py. Kinds of parameters: text, number, and microseconds for Triton's own timeout.
const MODEL = 'ResNet101';
const INPUT = 'image';
const OUTPUTS = ['original', 'segmented', 'mask', 'encoded'];
const PARAMETERS = {class_name: 'text', threshold: 'number', format: 'text', quality: 'number', timeout: 'microseconds'};

// Bytes that may stand in front of a photo.
const MAX_HEAD = 16384;
const LONGEST_TIMEOUT = 86400e6;
// What a text and an id must not have: what needs an escape in JSON or in a log.
const NO_TEXT = /[^ !#-\[\]-~]/;
const NO_ID = /[^\w.:-]/;

function check(condition, sentence) {
    if (!condition) {
        throw sentence;
    }
}

function check_id(id) {
    check(typeof id == 'string' && id.length <= 128 && !NO_ID.test(id), 'id may have up to 128 letters, digits and . : _ -');
    return id;
}

function check_photo(bytes) {
    check(bytes > 0, 'the photo is missing: its bytes follow what describes the request');
}

function kind_of(parameter) {
    const names = Object.keys(PARAMETERS);
    check(names.includes(parameter), `unknown parameter, not one of ${names.join(', ')}`);
    return PARAMETERS[parameter];
}

function check_parameter(name, value) {
    switch (kind_of(name)) {
    case 'text':
        check(typeof value == 'string' && value.length <= 256 && !NO_TEXT.test(value),
              `${name} must be text of up to 256 ASCII characters, without quotes and backslashes`);
        break;
    case 'number':
        check(typeof value == 'number' && isFinite(value), `${name} must be a number`);
        break;
    default:
        check(Number.isInteger(value) && value >= 0 && value <= LONGEST_TIMEOUT,
              `${name} must be a whole number of microseconds from 0 to ${LONGEST_TIMEOUT}`);
    }
}

function check_output(name, earlier) {
    check(OUTPUTS.includes(name), `unknown output, not one of ${OUTPUTS.join(', ')}`);
    check(!earlier.includes(name), `the output ${name} is named twice`);
}

// HTTP: JSON, then the photo

function check_members(object, names, where) {
    check(object !== null && typeof object == 'object' && !Array.isArray(object), `${where} must be an object`);
    check(Object.keys(object).every(name => names.includes(name)), `${where} may have ${names.join(', ')}, and nothing else`);
}

// Return JSON of the request that has only what is known here.
function clean_json(json, photo_bytes) {
    let request;
    try {
        request = JSON.parse(json);
    } catch (error) {
        throw 'the JSON of the request is malformed';
    }
    check_members(request, ['id', 'inputs', 'outputs', 'parameters'], 'the request');
    const clean = {};
    if (request.id !== undefined) {
        clean.id = check_id(request.id);
    }

    check(Array.isArray(request.inputs) && request.inputs.length == 1, `inputs must have one element, ${INPUT}`);
    const input = request.inputs[0];
    check_members(input, ['name', 'datatype', 'shape', 'parameters'], 'the input');
    check_members(input.parameters, ['binary_data_size'], 'parameters of the input');
    clean.inputs = [{name: INPUT, datatype: 'UINT8', shape: [1, photo_bytes], parameters: {binary_data_size: photo_bytes}}];
    check(input.name === INPUT && input.datatype === 'UINT8' && Array.isArray(input.shape) && input.shape.length == 2 &&
          input.shape[0] === 1 && input.shape[1] === photo_bytes && input.parameters.binary_data_size === photo_bytes,
          `the input must be ${INPUT}, UINT8, [1, N], with N and binary_data_size the number of bytes behind the JSON`);

    const parameters = request.parameters === undefined ? {} : request.parameters;
    check_members(parameters, ['binary_data_output'].concat(Object.keys(PARAMETERS)), 'parameters');
    const binary = parameters.binary_data_output;
    check(binary === undefined || typeof binary == 'boolean', 'binary_data_output must be true or false');
    Object.keys(parameters).filter(name => name != 'binary_data_output').forEach(name => {
        check_parameter(name, parameters[name]);
    });

    const outputs = request.outputs === undefined ? [] : request.outputs;
    check(Array.isArray(outputs), 'outputs must be a list');
    const names = [];
    clean.outputs = outputs.map(output => {
        check_members(output, ['name', 'parameters'], 'an output');
        check_output(output.name, names);
        names.push(output.name);
        if (output.parameters === undefined) {
            check_binary(binary);
            return {name: output.name};
        }
        check_members(output.parameters, ['binary_data'], 'parameters of an output');
        check_binary(output.parameters.binary_data);
        return {name: output.name, parameters: {binary_data: true}};
    });
    if (!outputs.length) {
        check_binary(binary);
        delete clean.outputs;
    }
    const text = JSON.stringify(clean);
    const members = Object.keys(parameters).map(name => `"${name}":${write_value(name, parameters[name])}`);
    return members.length ? `${text.slice(0, -1)},"parameters":{${members.join()}}}` : text;
}

function write_value(name, value) {
    const usual = JSON.stringify(value);
    if (PARAMETERS[name] != 'number') {
        return usual;
    }
    const scientific = value.toExponential().replace('+', '');
    return scientific.length < usual.length ? scientific : usual;
}

function check_binary(flag) {
    check(flag === true, 'ask for binary data, with binary_data_output in parameters, or binary_data for each output: true');
}

function check_http(file, json_bytes) {
    const photo_bytes = file.size - json_bytes;
    check_photo(photo_bytes);
    if (json_bytes) {
        // Triton reads what is written here. It takes the place of what the client wrote, so that the photo need not move.
        const clean = clean_json(file.head.slice(0, json_bytes).toString(), photo_bytes);
        check(clean.length <= json_bytes, 'write the numbers in the JSON without exponents');
        fs.writeSync(file.descriptor, clean + ' '.repeat(json_bytes - clean.length), 0);
    }
}

// gRPC: a protobuf message, ModelInferRequest, with the photo at its end. Its fields, all of them strings of bytes, are in
// the order of their numbers, as all of protobuf's libraries write them.

const MODEL_NAME = 1 << 3 | 2, REQUEST_ID = 3 << 3 | 2, PARAMETER = 4 << 3 | 2;
const INPUT_TENSOR = 5 << 3 | 2, OUTPUT_TENSOR = 6 << 3 | 2, RAW_INPUT = 7 << 3 | 2;
const NAME = 1 << 3 | 2, DATATYPE = 2 << 3 | 2, SHAPE = 3 << 3 | 2;  // of a tensor
const KEY = 1 << 3 | 2, VALUE = 2 << 3 | 2;  // of an entry of parameters
const INT64 = 2 << 3, STRING = 3 << 3 | 2, DOUBLE = 4 << 3 | 1;  // of a value

function Reader(bytes) {
    this.bytes = bytes;
    this.at = 0;
}

Reader.prototype.done = function () {
    return this.at == this.bytes.length;
};

Reader.prototype.byte = function () {
    check(this.at < this.bytes.length, 'the message is malformed, or too long in front of the photo');
    return this.bytes[this.at++];
};

Reader.prototype.varint = function () {
    let value = 0;
    for (let factor = 1; factor < Math.pow(2, 70); factor *= 128) {
        const byte = this.byte();
        value += byte % 128 * factor;
        if (byte < 128) {
            return value;
        }
    }
    throw 'the message is malformed';
};

Reader.prototype.string = function () {
    const length = this.varint();
    check(length <= this.bytes.length - this.at, 'the message is malformed, or too long in front of the photo');
    this.at += length;
    return this.bytes.slice(this.at - length, this.at);
};

function varint(value) {
    return value < 128 ? [value] : [128 + value % 128].concat(varint(Math.floor(value / 128)));
}

// Return a field of a message: a string, or the bytes of an array.
function field(tag, content) {
    return Buffer.concat([Buffer.from([tag, content.length]), Buffer.from(content)]);
}

function check_entry(bytes, earlier) {
    const entry = new Reader(bytes);
    check(entry.byte() == KEY, 'a parameter must have a name');
    const name = entry.string().toString();
    const kind = kind_of(name);
    check(!earlier.includes(name), `the parameter ${name} is named twice`);
    earlier.push(name);
    check(entry.byte() == VALUE, `the parameter ${name} must have a value`);
    const value = new Reader(entry.string());
    const tag = value.byte();
    if (tag == STRING) {
        check_parameter(name, value.string().toString());
    } else if (tag == INT64) {
        const number = value.varint();
        check_parameter(name, number < Math.pow(2, 63) ? number : -1);  // all negative numbers are alike here
    } else if (tag == DOUBLE && kind == 'number') {
        check(value.bytes.length == 9, 'the message is malformed');
        value.at = 9;
    } else {
        throw `the parameter ${name} has a value of the wrong type`;
    }
    check(value.done() && entry.done(), `the parameter ${name} has more than one value`);
}

function check_grpc(file) {
    check(file.size > 5 && file.head[0] == 0 && file.head.readUInt32BE(1) == file.size - 5, 'send one message, uncompressed');
    const message = new Reader(file.head.slice(5));
    const inputs = [], outputs = [], parameters = [];
    let model = '', previous = 0, tag;
    for (tag = message.byte(); tag != RAW_INPUT; tag = message.byte()) {
        check(tag >= previous, 'the fields of the message must be in the order of their numbers');
        previous = tag;
        const bytes = message.string();
        switch (tag) {
        case MODEL_NAME:
            model = bytes.toString();
            break;
        case REQUEST_ID:
            check_id(bytes.toString());
            break;
        case PARAMETER:
            check_entry(bytes, parameters);
            break;
        case INPUT_TENSOR:
            inputs.push(bytes);
            break;
        case OUTPUT_TENSOR:
            const name = bytes.slice(2).toString();
            check_output(name, outputs);
            check(field(NAME, name).equals(bytes), `the output ${name} may have its name, and nothing else`);
            outputs.push(name);
            break;
        default:
            throw 'the message has a field that is not known here';
        }
    }
    const photo_bytes = message.varint();
    check_photo(photo_bytes);
    check(5 + message.at + photo_bytes == file.size, 'raw_input_contents must be one photo, at the end of the message');
    check(model === MODEL, `the model must be ${MODEL}`);
    const shape = [1].concat(varint(photo_bytes));
    const expected = Buffer.concat([field(NAME, INPUT), field(DATATYPE, 'UINT8'), field(SHAPE, shape)]);
    check(inputs.length == 1 && inputs[0].equals(expected),
          `the input must be ${INPUT}, UINT8, [1, N], with N the number of bytes in raw_input_contents, and nothing else`);
}

// Call a check with the body of a request, then hand the request to a location, or refuse it.
function examine(r, check_body, location) {
    try {
        const path = r.variables.request_body_file;
        check_photo(path ? 1 : 0);
        const file = {descriptor: fs.openSync(path, 'r+'), head: Buffer.alloc(MAX_HEAD)};
        try {
            file.size = fs.fstatSync(file.descriptor).size;
            file.head = file.head.slice(0, fs.readSync(file.descriptor, file.head, 0, MAX_HEAD, 0));
            check_body(file);
        } finally {
            fs.closeSync(file.descriptor);
        }
    } catch (error) {
        if (typeof error != 'string') {
            throw error;
        }
        r.variables.refusal = error;
        r.return(400);
        return;
    }
    r.internalRedirect(location);
}

function http(r) {
    examine(r, file => check_http(file, Number(r.variables.http_inference_header_content_length)), '@http_servers');
}

function grpc(r) {
    examine(r, check_grpc, '@grpc_servers');
}

export default {http, grpc};
