-- An inference over HTTP: parse and check the JSON part and rewrite it with tensors in the binary form. Why: Triton
-- then parses only bytes that tensors.lua wrote. Triton 24.10 exits on some JSON data (a shape larger than the memory,
-- nested brackets), and uses the first of two equal keys where cjson uses the last.
local body = require("body")
local decoding = require("decoding")
local tensors = require("tensors")
local cjson = require("cjson.safe").new()
cjson.decode_max_depth(10)
cjson.decode_invalid_numbers(false)

local MOST_TENSORS, MOST_STRINGS = 8, 10000
local LENGTH_HEADER = "Inference-Header-Content-Length"
local reject, quoted = tensors.reject, tensors.quoted

local function respond(status, message)
    ngx.status = status
    ngx.header["Content-Type"] = "application/json"
    ngx.print(cjson.encode({ error = message }))
    return ngx.exit(status)
end

local function keys_in(value)
    local keys = 0
    for key, inner in pairs(value) do
        keys = keys + (type(key) == "string" and 1 or 0) + (type(inner) == "table" and keys_in(inner) or 0)
    end
    return keys
end

-- Decode a JSON object. Duplicate keys are detected by counting: the decoded object has each key once.
local function decode(text)
    local object = cjson.decode(text)
    if type(object) ~= "table" then
        reject("the JSON part of the body is not a JSON object")
    end
    local plain, keys, offset, strings = text:gsub("\\.", "__"), 0, 1, 0
    local first, last = plain:find('"[^"]*"')
    while first do
        strings, offset = strings + 1, last + 1
        if strings > MOST_STRINGS then
            reject("the JSON part has more than " .. MOST_STRINGS .. " strings")
        end
        keys = keys + (plain:find("^%s*:", offset) and 1 or 0)
        first, last = plain:find('"[^"]*"', offset)
    end
    if keys ~= keys_in(object) then
        reject("the JSON part has a key twice")
    end
    return object
end

-- Reject a value that is not an object, has other keys than those of `kinds`, or a value of another type than listed
-- there.
local function check_object(object, where, kinds)
    if type(object) ~= "table" or object[1] ~= nil then
        reject(where .. "is not an object")
    end
    for key, value in pairs(object) do
        local kind = kinds[key]
        if not kind then
            reject(where .. "parameter " .. quoted(key) .. " is not accepted here; leave it out")
        elseif type(value) ~= kind then
            reject(where .. key .. " is not a " .. kind)
        end
    end
end

local function list(value, where)
    if value == nil then
        return {}
    elseif next(value) ~= nil and value[1] == nil or #value > MOST_TENSORS then
        reject(where .. " is not a list of at most " .. MOST_TENSORS .. " entries")
    end
    return value
end

local function flatten(data, into)
    for key in pairs(data) do
        if type(key) ~= "number" then
            reject("data contains an object")
        end
    end
    for _, value in ipairs(data) do
        if type(value) == "table" then
            flatten(value, into)
        else
            table.insert(into, value)
        end
    end
    return into
end

-- Parse an entry of `inputs`; its binary data, if any, begin at `offset`. Returns the input and the offset behind its
-- data.
local function read_input(entry, offset, source)
    local name = type(entry) == "table" and entry.name
    local where = "input " .. quoted(name) .. ": "
    check_object(entry, where, { name = "string", datatype = "string", shape = "table", data = "table", parameters = "table" })
    local parameters = entry.parameters or {}
    check_object(parameters, where, { binary_data_size = "number" })
    local input = { name = name, datatype = entry.datatype, shape = list(entry.shape, where .. "shape") }
    local size = parameters.binary_data_size
    if size == nil then
        input.values = entry.data and flatten(entry.data, {})
        return input, offset
    elseif entry.data then
        reject(where .. "has both data and binary_data_size")
    elseif not tensors.whole(size, 0, source.size - offset) then
        reject(where .. "binary_data_size is not a size within the body")
    end
    input.offset, input.size = offset, size
    return input, offset + size
end

-- Parse and check the request in a body whose first `length` bytes are JSON.
local function parse(source, length)
    local object = decode(source.read(0, length))
    local kinds = { id = "string", model_name = "string", inputs = "table", outputs = "table", parameters = "table" }
    check_object(object, "", kinds)
    if (object.model_name or ngx.var.model) ~= ngx.var.model then
        reject("model_name is not " .. ngx.var.model .. ", as in the path") -- KServe's client sends both
    end
    local parameters = object.parameters or {}
    check_object(parameters, "", { binary_data_output = "boolean" })
    local request = { model = ngx.var.model, id = object.id or "", inputs = {}, outputs = {} }
    local offset = length
    for index, entry in ipairs(list(object.inputs, "inputs")) do
        request.inputs[index], offset = read_input(entry, offset, source)
    end
    if offset ~= source.size then
        reject("the body has " .. source.size - offset .. " bytes more than binary_data_size of all inputs")
    end
    request.binary = parameters.binary_data_output or false
    for index, entry in ipairs(list(object.outputs, "outputs")) do
        local where = "output " .. quoted(type(entry) == "table" and entry.name) .. ": "
        check_object(entry, where, { name = "string", parameters = "table" })
        local options = entry.parameters or {}
        check_object(options, where, { binary_data = "boolean", classification = "number" })
        local binary = options.binary_data == nil and request.binary or options.binary_data or false
        request.outputs[index] = { name = entry.name, binary = binary, classification = options.classification }
    end
    tensors.check(request, source)
    return request
end

if ngx.var.args then
    return respond(400, "query parameters are not accepted here; leave out the question mark and what follows it")
end
local source = body.open()
local header = ngx.req.get_headers()[LENGTH_HEADER]
local length = source.size
if header ~= nil then
    length = type(header) == "string" and header:match("^[1-9]%d*$") and #header < 10 and tonumber(header)
    if not length or length > source.size then
        return respond(400, LENGTH_HEADER .. " is not a number from 1 to the " .. source.size .. " bytes of the body")
    end
end
if length > tensors.MOST_JSON then
    return respond(400, "the JSON part has more than " .. tensors.MOST_JSON .. " bytes; send tensors in the binary form")
end
local request, message = tensors.parsed(parse, source, length)
local replaced = request and body.replace(source, tensors.rebuild(request))
body.close(source)
if message then
    return respond(400, message)
elseif not replaced then
    return respond(503, "the gateway cannot write to its disk; try again later")
end
message = decoding.enter(request.pixels)
if message then
    return respond(429, message)
end
