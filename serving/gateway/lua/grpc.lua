-- An inference over gRPC: parse and check the ModelInferRequest and send it to Triton over HTTP in the form of
-- tensors.rebuild; grpc_response.lua converts the response. Fields that are not listed here are rejected. Why HTTP:
-- over gRPC, Triton 24.10 exits (SIGSEGV) after some thousand calls that are cancelled or whose deadline expires.
local body = require("body")
local decoding = require("decoding")
local ffi = require("ffi")
local tensors = require("tensors")
local reject, quoted = tensors.reject, tensors.quoted

local FRAME, LONGEST_TEXT, MOST_FIELDS = 5, 200, 8192
local INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNAVAILABLE = 3, 5, 8, 14
local NOT_PROTOBUF = "message is not a ModelInferRequest"

-- The name and kind of each field by its number, from Triton's grpc_service.proto. A table as kind is a nested message.
local VALUE = { { "bool", "numbers" }, { "int64", "numbers" }, { "string", "texts" }, [5] = { "uint64", "numbers" } }
local PARAMETER = { { "key", "texts" }, { "value", VALUE } }
local CONTENTS = { [4] = { "UINT8", "numbers" }, [6] = { "FP32", "floats" }, [8] = { "BYTES", "strings" } }
local INPUT = { { "name", "texts" }, { "datatype", "texts" }, { "shape", "numbers" }, { "parameters", PARAMETER }, { "contents", CONTENTS } }
local OUTPUT = { { "name", "texts" }, { "parameters", PARAMETER } }
local REQUEST = {
    { "model_name", "texts" },
    { "model_version", "texts" },
    { "id", "texts" },
    { "parameters", PARAMETER },
    { "inputs", INPUT },
    { "outputs", OUTPUT },
    { "raw", "pieces" },
}

local function respond(status, message)
    ngx.var.grpc_status, ngx.var.grpc_message = status, ngx.escape_uri(message)
    ngx.header["Content-Type"] = "application/grpc"
    ngx.send_headers()
    ngx.eof()
    return ngx.exit(ngx.OK)
end

-- Read a varint: returns its value and the offset behind it.
local function varint(source, offset, stop)
    local value, factor = 0, 1
    for index, byte in ipairs({ source.read(offset, math.min(10, stop - offset)):byte(1, 10) }) do
        value, factor = value + byte % 128 * factor, factor * 128
        if byte < 128 then
            return value, offset + index
        end
    end
    reject(NOT_PROTOBUF)
end

-- By kind, a function that adds the bytes of a field to the list of its values.
local ADD = {
    texts = function(source, offset, size, values)
        table.insert(values, size <= LONGEST_TEXT and source.read(offset, size) or reject("message has a string of " .. size .. " bytes"))
    end,
    strings = function(source, offset, size, values)
        table.insert(values, source.read(offset, size))
    end,
    pieces = function(_, offset, size, values)
        table.insert(values, { offset = offset, size = size })
    end,
    numbers = function(source, offset, size, values)
        local data, count, value, factor = source.read(offset, size), #values, 0, 1
        for index = 1, size do
            local byte = data:byte(index)
            value, factor = value + byte % 128 * factor, factor * 128
            if byte < 128 then
                count = count + 1
                values[count], value, factor = value, 0, 1
            end
        end
        if factor > 1 then
            reject(NOT_PROTOBUF)
        end
    end,
    floats = function(source, offset, size, values)
        if size % 4 > 0 then
            reject(NOT_PROTOBUF)
        end
        local floats = ffi.new("float[?]", size / 4)
        ffi.copy(floats, source.read(offset, size), size)
        for index = 0, size / 4 - 1 do
            table.insert(values, tonumber(floats[index]))
        end
    end,
}

-- Decode a message by its schema: a table of lists, the values of each field by its name. Counts the fields of the
-- request and the bytes of its typed contents in `source`.
local function decode(source, offset, size, schema)
    local message, stop = {}, offset + size
    for _, field in pairs(schema) do
        message[field[1]] = {}
    end
    while offset < stop do
        local tag, start, number
        tag, start = varint(source, offset, stop)
        number, offset = varint(source, start, stop)
        local field, wire = schema[math.floor(tag / 8)], tag % 8
        source.fields = (source.fields or 0) + 1
        if not field or source.fields > MOST_FIELDS then
            reject("message has a field that is not accepted here, or too many fields")
        elseif wire == 0 and field[2] == "numbers" then
            table.insert(message[field[1]], number)
        elseif wire ~= 2 or offset + number > stop then
            reject(NOT_PROTOBUF)
        elseif type(field[2]) == "table" then
            table.insert(message[field[1]], decode(source, offset, number, field[2]))
            offset = offset + number
        else
            source.typed = (source.typed or 0) + (field[2] ~= "pieces" and number or 0)
            if source.typed > tensors.MOST_JSON then
                reject("contents have more than " .. tensors.MOST_JSON .. " bytes; send raw_input_contents")
            end
            ADD[field[2]](source, offset, number, message[field[1]])
            offset = offset + number
        end
    end
    return message
end

-- The value of a field that may occur at most once.
local function single(message, name)
    if #message[name] > 1 then
        reject(name .. " is given twice")
    end
    return message[name][1]
end

-- The integer value of the only parameter that a tensor may have.
local function parameter(message, name, where)
    local entry = message.parameters[1]
    if entry then
        local key, value = single(entry, "key"), single(entry, "value")
        local others = value and #value.bool + #value.string + #value.uint64 or 1
        if key ~= name or #message.parameters > 1 or others > 0 or not value.int64[1] then
            reject(where .. ": parameter " .. quoted(key) .. " is not accepted here")
        end
        return single(value, "int64")
    end
end

local function read_input(message, raw)
    local input = { name = single(message, "name"), datatype = single(message, "datatype"), shape = message.shape }
    local contents = single(message, "contents")
    if contents and raw then
        reject("input " .. quoted(input.name) .. " has both contents and raw_input_contents")
    elseif contents then
        input.values = contents[input.datatype] or {}
        for datatype, values in pairs(contents) do
            if datatype ~= input.datatype and #values > 0 then
                reject("input " .. quoted(input.name) .. ": contents have another datatype")
            end
        end
    elseif raw then
        input.offset, input.size = raw.offset, raw.size
    end
    -- KServe's client sends the size here too.
    local size = parameter(message, "binary_data_size", "input " .. quoted(input.name))
    if size and not (raw and size == raw.size) then
        reject("input " .. quoted(input.name) .. ": binary_data_size is not the size of its raw_input_contents")
    end
    return input
end

local function parse(source)
    local frame = { source.read(0, FRAME):byte(1, FRAME) }
    if #frame < FRAME or frame[1] ~= 0 then
        reject("message is missing or compressed; send one plain message")
    end
    if FRAME + ((frame[2] * 256 + frame[3]) * 256 + frame[4]) * 256 + frame[5] ~= source.size then
        reject("message does not have the length in its frame, or is not the only one")
    end
    local message = decode(source, FRAME, source.size - FRAME, REQUEST)
    local version = single(message, "model_version") or ""
    local request = { model = single(message, "model_name"), version = version, id = single(message, "id") or "", binary = true }
    if not tensors.MODELS[request.model] or not version:match("^%d*$") or #version > 9 then
        error({ rejected = "model_name or model_version is unknown; expected student, classifier or segmenter", status = NOT_FOUND }, 0)
    elseif message.parameters[1] then
        local key = quoted(single(message.parameters[1], "key"))
        reject("parameter " .. key .. " is not accepted here; set the deadline of the call instead")
    elseif #message.raw > 0 and #message.raw ~= #message.inputs then
        reject("raw_input_contents has " .. #message.raw .. " entries for " .. #message.inputs .. " inputs")
    end
    request.inputs, request.outputs = {}, {}
    for index, input in ipairs(message.inputs) do
        request.inputs[index] = read_input(input, message.raw[index])
    end
    for index, output in ipairs(message.outputs) do
        local name = single(output, "name")
        local labels = parameter(output, "classification", "output " .. quoted(name))
        request.outputs[index] = { name = name, binary = true, classification = labels }
    end
    tensors.check(request, source)
    return request
end

local source = body.open()
local request, message, status = tensors.parsed(parse, source)
local replaced = request and body.replace(source, tensors.rebuild(request))
body.close(source)
if replaced then
    local version = request.version ~= "" and "/versions/" .. request.version or ""
    ngx.var.target = "/v2/models/" .. request.model .. version .. "/infer"
end
if message then
    return respond(status or INVALID_ARGUMENT, message)
elseif not replaced then
    return respond(UNAVAILABLE, "the gateway cannot write to its disk; try again later")
end
message = decoding.enter(request.pixels)
if message then
    return respond(RESOURCE_EXHAUSTED, message)
end
