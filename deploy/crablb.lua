-- SPDX-License-Identifier: MIT
-- Wireshark and tshark: the TCP option of connection redirection, in both forms.
--
--   tshark -X lua_script:deploy/crablb.lua -r F.pcapng -Y crablb
--   cp deploy/crablb.lua ~/.local/lib/wireshark/plugins/    (Wireshark; Help, About, Folders has the place)
--
-- What one can filter by: crablb.type, crablb.form, crablb.vip ("10.0.0.100", "fd00::100"), crablb.vip4 and crablb.vip6
-- (addresses, also by prefix: crablb.vip4 == 10.0.0.0/24), crablb.length, crablb.malformed, crablb.misplaced.

local crablb = Proto("crablb", "Connection redirection")

local KIND, EXPERIMENTAL, EXID = 42, 253, 0x4352
local OFFER, REDIRECT, ECHO, MALFORMED = 1, 2, 3, 0
local TYPES = { [OFFER] = "offer", [REDIRECT] = "redirect", [ECHO] = "echo", [MALFORMED] = "malformed" }

local fields = {
    option = ProtoField.bytes("crablb.option", "Option"),
    form = ProtoField.uint8("crablb.form", "Form", base.DEC, { [KIND] = "crab", [EXPERIMENTAL] = "experimental" }),
    length = ProtoField.uint8("crablb.length", "Length", base.DEC),
    type = ProtoField.uint8("crablb.type", "Type", base.DEC, TYPES),
    vip = ProtoField.string("crablb.vip", "VIP"),
    vip4 = ProtoField.ipv4("crablb.vip4", "VIP (IPv4)"),
    vip6 = ProtoField.ipv6("crablb.vip6", "VIP (IPv6)"),
}
crablb.fields = fields

local experts = {
    malformed = ProtoExpert.new("crablb.malformed", "An option of connection redirection with a length that none has",
                                expert.group.MALFORMED, expert.severity.WARN),
    misplaced = ProtoExpert.new("crablb.misplaced", "An option of connection redirection where nobody reads it",
                                expert.group.PROTOCOL, expert.severity.NOTE),
}
crablb.experts = experts

local tcp_options = Field.new("tcp.options")

-- One option, from its kind on; `flags` are its TCP header's.
local function show(option, flags, pinfo, tree)
    local form = option(0, 1):uint()
    local head = form == KIND and 2 or 4
    local size = option:len() - head
    local syn, ack = math.floor(flags / 2) % 2 == 1, math.floor(flags / 16) % 2 == 1
    local type = MALFORMED
    if size == 0 then
        type = OFFER
    elseif size == 4 or size == 16 then
        type = ack and ECHO or REDIRECT
    end
    local text = "CR " .. TYPES[type]
    local branch = tree:add(crablb, option)
    branch:add(fields.option, option)
    branch:add(fields.form, option(0, 1))
    if option:len() > 1 then
        branch:add(fields.length, option(1, 1))
    end
    branch:add(fields.type, option, type)
    if size == 4 then
        branch:add(fields.vip4, option(head, 4))
        text = text .. " " .. tostring(option(head, 4):ipv4())
        branch:add(fields.vip, option(head, 4), tostring(option(head, 4):ipv4()))
    elseif size == 16 then
        branch:add(fields.vip6, option(head, 16))
        text = text .. " " .. tostring(option(head, 16):ipv6())
        branch:add(fields.vip, option(head, 16), tostring(option(head, 16):ipv6()))
    end
    branch:set_text("Connection redirection: " .. text:sub(4))
    if type == MALFORMED then
        branch:add_proto_expert_info(experts.malformed)
    elseif not syn or (type == OFFER and ack) then
        branch:add_proto_expert_info(experts.misplaced)
    end
    pinfo.cols.info:append(" [" .. text .. "]")
end

-- A list is a list of options, never of words: it is walked to its end, or to where it cannot go on.
local function walk(options, flags, pinfo, tree)
    local at, len = 0, options:len()
    while at < len do
        local kind = options(at, 1):uint()
        if kind == 0 then
            return
        elseif kind == 1 then
            at = at + 1
        else
            local size = at + 1 < len and options(at + 1, 1):uint() or 0
            local whole = size >= 2 and at + size <= len
            local has_exid = at + 4 <= len and options(at + 2, 2):uint() == EXID
            local option = options(at, whole and size or len - at)
            if kind == KIND and not whole or kind == EXPERIMENTAL and has_exid and (not whole or size < 4) then
                local branch = tree:add(crablb, option)
                branch:add(fields.option, option)
                branch:add(fields.form, options(at, 1))
                branch:add(fields.type, option, MALFORMED)
                branch:add_proto_expert_info(experts.malformed)
                pinfo.cols.info:append(" [CR malformed]")
            elseif kind == KIND or kind == EXPERIMENTAL and has_exid then
                show(option, flags, pinfo, tree)
            end
            if not whole then
                return
            end
            at = at + size
        end
    end
end

function crablb.dissector(_, pinfo, tree)
    -- Of one packet there may be several: an ICMP error quotes another one.
    for _, info in ipairs({ tcp_options() }) do
        local flags = info.source(info.offset - 7, 1):uint() -- the options begin 20 bytes behind the header's begin
        walk(info.range, flags, pinfo, tree)
    end
end

register_postdissector(crablb)
