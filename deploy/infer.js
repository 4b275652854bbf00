// SPDX-License-Identifier: Apache-2.0
// Checks inference requests before Triton gets them, because Triton 2.51 trusts their contents: see docs/security.md.
// Rejects anything that this file does not know, with a sentence. nginx.conf calls http() and grpc() when a body is
// complete and in a file. They read only the part before the photo.
import fs from 'fs';

// The contract, as in server.py and jobs.py. Parameters are text or numbers; the microseconds are Triton's own.
const MODEL = 'ResNet101';
const INPUT = 'image';
const OUTPUTS = ['original', 'segmented', 'mask', 'probability', 'labels', 'encoded'];
const PARAMETERS = {
    class_name: 'text', threshold: 'number', format: 'text', quality: 'number', content: 'text', edge: 'number',
    timeout: 'microseconds',
};

const MAX_HEAD_BYTES = 16384;  // before a photo
const MAX_TIMEOUT = 86400e6;
// No regular expressions from ^ to $: in njs, $ also matches before a line feed at the end.
const NO_TEXT = /[^ !#-\[\]-~]/;  // characters that need an escape in JSON or in a log
const NO_ID = /[^\w.:-]/;

function check(condition, sentence) {
    if (!condition) {
        throw sentence;
    }
}

function check_photo(bytes) {
    check(bytes > 0, 'the photo is missing: send its bytes after the JSON, or as raw_input_contents');
}

function check_id(id) {
    check(typeof id == 'string' && id.length <= 128 && !NO_ID.test(id),
          'id must have up to 128 letters, digits and . : _ -');
}

function check_output(name, others) {
    check(OUTPUTS.includes(name), `unknown output, not one of ${OUTPUTS.join(', ')}`);
    check(!others.includes(name), `the output ${name} is named twice`);
}

function check_parameter(name, value) {
    const names = Object.keys(PARAMETERS);
    check(names.includes(name), `unknown parameter, not one of ${names.join(', ')}`);
    if (PARAMETERS[name] == 'text') {
        check(typeof value == 'string' && value.length <= 256 && !NO_TEXT.test(value),
              `${name} must be text of up to 256 ASCII characters, without quotes and backslashes`);
    } else if (PARAMETERS[name] == 'number') {
        check(typeof value == 'number' && isFinite(value), `${name} must be a number`);
    } else {
        check(Number.isInteger(value) && value >= 0 && value <= MAX_TIMEOUT,
              `${name} must be a whole number of microseconds from 0 to ${MAX_TIMEOUT}`);
    }
}

// Over HTTP, the body is a photo, with or without JSON before it. Triton might parse the client's JSON differently, so
// this file overwrites it with its own JSON, in place: the photo does not move.

function check_http(file, json_bytes) {
    const photo_bytes = file.size - json_bytes;
    check_photo(photo_bytes);
    if (json_bytes) {
        const json = clean_json(file.head.slice(0, json_bytes).toString(), photo_bytes);
        check(json.length <= json_bytes, 'write the numbers in the JSON without exponents');
        fs.writeSync(file.descriptor, json + ' '.repeat(json_bytes - json.length), 0);
    }
}

function clean_json(json, photo_bytes) {
    let request;
    try {
        request = JSON.parse(json);
    } catch (error) {
        throw 'the JSON of the request is malformed';
    }
    check_members('the request', request, ['id', 'inputs', 'outputs', 'parameters']);
    const members = [];
    if ('id' in request) {
        check_id(request.id);
        members.push(`"id":"${request.id}"`);
    }

    check(Array.isArray(request.inputs) && request.inputs.length == 1, `inputs must have one element, ${INPUT}`);
    const input = request.inputs[0];
    check_members('the input', input, ['name', 'datatype', 'shape', 'parameters']);
    check_members('parameters of the input', input.parameters, ['binary_data_size']);
    check(input.name === INPUT && input.datatype === 'UINT8' && input.parameters.binary_data_size === photo_bytes &&
          JSON.stringify(input.shape) == `[1,${photo_bytes}]`,
          `the input must be ${INPUT}, UINT8, [1, N], with N and binary_data_size the number of bytes after the JSON`);
    members.push(`"inputs":[{"name":"${INPUT}","datatype":"UINT8","shape":[1,${photo_bytes}],` +
                 `"parameters":{"binary_data_size":${photo_bytes}}}]`);

    const parameters = 'parameters' in request ? request.parameters : {};
    check_members('parameters', parameters, ['binary_data_output'].concat(Object.keys(PARAMETERS)));
    if (Object.keys(parameters).length) {
        const clean = Object.keys(parameters).map(name => clean_parameter(name, parameters[name]));
        members.push(`"parameters":{${clean.join()}}`);
    }

    const outputs = 'outputs' in request ? request.outputs : [];
    check(Array.isArray(outputs), 'outputs must be a list');
    if (outputs.length) {
        const names = [];
        const clean = outputs.map(output => clean_output(output, names, parameters.binary_data_output));
        members.push(`"outputs":[${clean.join()}]`);
    } else {
        check_binary(parameters.binary_data_output);
    }
    return `{${members.join()}}`;
}

function check_members(where, object, names) {
    check(object !== null && typeof object == 'object' && !Array.isArray(object), `${where} must be an object`);
    check(Object.keys(object).every(name => names.includes(name)),
          `${where} may have ${names.join(', ')}, and nothing else`);
}

function check_binary(flag) {
    check(flag === true,
          'request binary data: set binary_data_output in parameters, or binary_data of each output, to true');
}

function clean_output(output, names, binary_data_output) {
    check_members('an output', output, ['name', 'parameters']);
    check_output(output.name, names);
    names.push(output.name);
    if (!('parameters' in output)) {
        check_binary(binary_data_output);
        return `{"name":"${output.name}"}`;
    }
    check_members('parameters of an output', output.parameters, ['binary_data']);
    check_binary(output.parameters.binary_data);
    return `{"name":"${output.name}","parameters":{"binary_data":true}}`;
}

function clean_parameter(name, value) {
    if (name == 'binary_data_output') {
        check(typeof value == 'boolean', `${name} must be true or false`);
        return `"${name}":${value}`;
    }
    check_parameter(name, value);
    let text = JSON.stringify(value);
    if (PARAMETERS[name] == 'number') {
        const scientific = value.toExponential().replace('+', '');
        text = scientific.length < text.length ? scientific : text;  // the client may have written 1e-5
    }
    return `"${name}":${text}`;
}

// Over gRPC, a body is a protobuf message, ModelInferRequest, whose last field is the photo. Protobuf allows fields in any
// order. Its libraries write them in the order of their numbers, and this code accepts only that order.

const LENGTH_DELIMITED = 2;
const MODEL_NAME = 1 << 3 | LENGTH_DELIMITED, ID = 3 << 3 | LENGTH_DELIMITED, PARAMETER = 4 << 3 | LENGTH_DELIMITED;
const TENSOR = 5 << 3 | LENGTH_DELIMITED, OUTPUT = 6 << 3 | LENGTH_DELIMITED, PHOTO = 7 << 3 | LENGTH_DELIMITED;
// Fields of fields
const NAME = 1 << 3 | LENGTH_DELIMITED, DATATYPE = 2 << 3 | LENGTH_DELIMITED, SHAPE = 3 << 3 | LENGTH_DELIMITED;
const VALUE = 2 << 3 | LENGTH_DELIMITED;
const INT64 = 2 << 3, STRING = 3 << 3 | LENGTH_DELIMITED, DOUBLE = 4 << 3 | 1;
const MALFORMED = 'the message is malformed, or too long before the photo';

function check_grpc(file) {
    check(file.size > 5 && file.head[0] == 0 && file.head.readUInt32BE(1) == file.size - 5,
          'send one message, uncompressed');
    const message = new Reader(file.head.slice(5));
    const once = {}, outputs = [], parameters = [];
    let previous = -1, tag;
    while ((tag = message.byte()) != PHOTO) {
        check(tag >= previous, 'the fields of the message must be in the order of their numbers');
        check(tag > previous || tag == PARAMETER || tag == OUTPUT, 'the message has a field twice');
        previous = tag;
        const bytes = message.bytes();
        if (tag == MODEL_NAME || tag == TENSOR) {
            once[tag] = bytes;
        } else if (tag == ID) {
            check_id(bytes.toString());
        } else if (tag == PARAMETER) {
            parameters.push(check_entry(bytes, parameters));
        } else {
            check(tag == OUTPUT, 'the message has an unknown field');
            const name = bytes.slice(2).toString();
            check_output(name, outputs);
            check(bytes.equals(field(NAME, name)), `the output ${name} may have its name, and nothing else`);
            outputs.push(name);
        }
    }
    const photo_bytes = message.varint();
    check_photo(photo_bytes);
    check(5 + message.at + photo_bytes == file.size, 'raw_input_contents must be one photo, at the end of the message');
    check(MODEL_NAME in once && once[MODEL_NAME].toString() == MODEL, `the model must be ${MODEL}`);
    const shape = [1].concat(varint(photo_bytes));
    const expected = Buffer.concat([field(NAME, INPUT), field(DATATYPE, 'UINT8'), field(SHAPE, shape)]);
    check(TENSOR in once && once[TENSOR].equals(expected),
          `the input must be ${INPUT}, UINT8, [1, N], with N the number of bytes in raw_input_contents, and nothing else`);
}

function check_entry(bytes, others) {
    const entry = new Reader(bytes);
    check(entry.byte() == NAME, MALFORMED);
    const name = entry.bytes().toString();
    check(entry.byte() == VALUE, MALFORMED);
    const value = new Reader(entry.bytes());
    const tag = value.byte();
    if (tag == STRING) {
        check_parameter(name, value.bytes().toString());
    } else if (tag == INT64) {
        const number = value.varint();
        check_parameter(name, number < Math.pow(2, 63) ? number : -1);  // stands for all negative numbers
    } else {
        check_parameter(name, tag == DOUBLE ? value.double() : undefined);
    }
    check(value.done() && entry.done(), MALFORMED);
    check(!others.includes(name), `the parameter ${name} is named twice`);
    return name;
}

// Reads a protobuf message.
function Reader(buffer) {
    this.buffer = buffer;
    this.at = 0;
}

Reader.prototype.done = function () {
    return this.at == this.buffer.length;
};

Reader.prototype.take = function (count) {
    check(count <= this.buffer.length - this.at, MALFORMED);
    this.at += count;
    return this.buffer.slice(this.at - count, this.at);
};

Reader.prototype.byte = function () {
    return this.take(1)[0];
};

Reader.prototype.varint = function () {
    let value = 0;
    for (let place = 0; place < 10; place++) {
        const byte = this.byte();
        value += byte % 128 * Math.pow(128, place);
        if (byte < 128) {
            return value;
        }
    }
    throw MALFORMED;
};

Reader.prototype.bytes = function () {
    return this.take(this.varint());
};

Reader.prototype.double = function () {
    return this.take(8).readDoubleLE();
};

// Write parts of a protobuf message: a number, and a field that is a string or a list of bytes.
function varint(value) {
    return value < 128 ? [value] : [128 + value % 128].concat(varint(Math.floor(value / 128)));
}

function field(tag, content) {
    return Buffer.concat([Buffer.from([tag, content.length]), Buffer.from(content)]);
}

// Triton resets a call if it cannot parse some of its headers. nginx takes this for a failure of the server, and after
// two of them, sends it no calls for 10 s. Of the headers that gRPC reserves, its clients send only these.
const GRPC = 'application/grpc';
const GRPC_HEADERS = ['grpc-timeout', 'grpc-encoding', 'grpc-accept-encoding'];

function check_grpc_header(name, value) {
    check(GRPC_HEADERS.includes(name) || !name.startsWith('grpc-') && !name.endsWith('-bin'),
          `of the headers grpc-... and ...-bin, the proxy accepts only ${GRPC_HEADERS.join(', ')}`);
    if (name == 'grpc-timeout') {
        const digits = value.slice(0, -1), unit = value.slice(-1);
        check(digits && digits.length <= 8 && !/\D/.test(digits) && 'HMSmun'.includes(unit),
              'grpc-timeout must be a number of up to 8 digits, and a unit');
    } else if (name == 'content-type') {
        check(value.startsWith(GRPC) && ['', '+', ';'].includes(value.charAt(GRPC.length)), `content-type must be ${GRPC}`);
    }
}

// The value of $grpc_headers in nginx.conf. If a header is invalid, the value is empty, and nginx rejects the call.
function grpc_headers(r) {
    try {
        r.rawHeadersIn.forEach(header => check_grpc_header(header[0].toLowerCase(), header[1]));
        return 'valid';
    } catch (error) {
        reject(r, error);
        return '';
    }
}

// Set the error message for the client.
function reject(r, error) {
    if (typeof error != 'string') {
        throw error;
    }
    r.variables.rejection = error;
}

// Check the body of a request, and pass it to a location or reject it.
function examine(r, check_body, location) {
    try {
        const path = r.variables.request_body_file;
        check_photo(path ? 1 : 0);
        const descriptor = fs.openSync(path, 'r+');
        try {
            const head = Buffer.alloc(MAX_HEAD_BYTES);
            const length = fs.readSync(descriptor, head, 0, MAX_HEAD_BYTES, 0);
            check_body({descriptor, head: head.slice(0, length), size: fs.fstatSync(descriptor).size});
        } finally {
            fs.closeSync(descriptor);
        }
    } catch (error) {
        reject(r, error);
        r.return(400);
        return;
    }
    r.internalRedirect(location);
}

function http(r) {
    const json_bytes = Number(r.variables.http_inference_header_content_length);
    examine(r, file => check_http(file, json_bytes), '@http_servers');
}

function grpc(r) {
    examine(r, check_grpc, '@grpc_servers');
}

// The folder of nginx.conf, with a trailing slash.
function folder() {
    return ngx.conf_prefix;
}

export default {http, grpc, grpc_headers, folder};
